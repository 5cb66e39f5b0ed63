"""The run's folder: claimed before anything is written, and never another run's."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import yaml

from isotune.config import RunRecipe
from isotune.config.run_recipe import RESUME_NEWEST
from isotune.io.errors import EXIT_FAULT, AlreadyDone, RunFault, UserError
from isotune.run.attempt import slurm_ids
from isotune.run.hub import is_first_process, upload_record, upload_run
from isotune.run.run_lease import RunLease

RECIPE = "recipe.yaml"
FINGERPRINT_KEY = "recipe_fingerprint"
ENVIRONMENT = "environment.json"
METRICS = "metrics.jsonl"
STATUS = "status.json"
CHECKPOINTS = "checkpoints"
MODEL = "model"
BASE_MODEL = "base_model"


class RunDir:
    """RUN of a recipe: `check` looks without touching, `begin` writes the first files.

    Raises:
        UserError: the folder holds another recipe's run or something else, cannot be written, or has no room.
    """

    def __init__(self, recipe: RunRecipe) -> None:
        self.recipe = recipe
        self.path = Path(recipe.output_dir)
        self.status: Any = None  # kept while the run is supervised
        self.fence = RunLease(self.path)

    @property
    def model(self) -> Path:
        """Where the final model or adapter goes."""
        return self.path / MODEL

    @property
    def base_model(self) -> Path:
        """Where a base goes that exists nowhere else, because it was made at random."""
        return self.path / BASE_MODEL

    def check(self) -> None:
        """Refuse what would be mixed up or lost, before any work is done.

        Raises:
            UserError: see the class, and a folder in use; that is looked up by the first process alone, for the others
                may come when it has taken it.
            AlreadyDone: the run is finished, and was not asked to begin anew.
            RunFault: the same, and what was judged at its end failed (a negative control's alarm).
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"output_dir '{self.path}' is a file")
        self._check_writable()
        # a file that was being put in its place when its process was killed has a name with a dot
        if os.environ.get("RANK", "0") == "0":
            self.fence.look()
        if not self.path.is_dir() or all(path.name.startswith(".") for path in self.path.iterdir()):
            return
        recorded = self.path / ENVIRONMENT
        if not recorded.is_file():
            raise UserError(f"output_dir '{self.path}' is not empty and holds no run: choose another --output_dir")
        earlier = _read_environment(recorded)
        if earlier.get(FINGERPRINT_KEY) != self.recipe.fingerprint():
            raise UserError(
                f"output_dir '{self.path}' holds the run of another recipe{self._differing_key()}: "
                "choose another --output_dir or remove it"
            )
        if self.model.is_dir() and self.recipe.resume == RESUME_NEWEST:
            again = "(--resume never runs it again from the start)"
            if (failure := self._failure()) is not None:
                raise RunFault(
                    f"output_dir '{self.path}' holds a run of this recipe that failed at its end: {failure} {again}"
                )
            raise AlreadyDone(
                f"output_dir '{self.path}' holds the finished run of this recipe: nothing is left to do {again}"
            )

    def check_or_upload(self) -> None:
        """`check`; a finished run whose upload was asked for and is still missing is uploaded, by the first process.

        Raises:
            UserError: see `check`, and `isotune.run.hub.upload_model`.
            AlreadyDone: the run is finished, and uploaded where that was asked for.
        """
        try:
            self.check()
        except AlreadyDone as done:
            recipe, before = self.recipe, upload_record(self.path)
            if not recipe.push_to_hub or not is_first_process():
                raise
            if before is None or before.repository.rsplit("/", 1)[-1] != recipe.hub_model_id.rsplit("/", 1)[-1]:
                before = upload_run(recipe)
            raise AlreadyDone(f"{done}; it is uploaded to {before.url}") from None

    def _failure(self) -> str | None:
        """What a run that saved its model failed by, from its status.json; None where it did not."""
        try:
            status = json.loads((self.path / STATUS).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        failed = isinstance(status, dict) and status.get("exit_status") == EXIT_FAULT
        return str(status.get("message")) if failed else None

    def _differing_key(self) -> str:
        try:
            earlier = yaml.safe_load((self.path / RECIPE).read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError):
            return ""
        for key, value in self.recipe.result_values().items():
            if isinstance(earlier, dict) and key in earlier and earlier[key] != value:
                return f" ({key}: {earlier[key]} there, {value} here)"
        return ""

    def _check_writable(self) -> None:
        existing = self.path
        while not existing.exists():
            existing = existing.parent
        if not os.access(existing, os.W_OK | os.X_OK):
            raise UserError(f"output_dir '{self.path}' cannot be written: no permission in {existing}")

    def check_room(self, needed_bytes: int) -> None:
        """Refuse to train for hours what the disk cannot hold at the end."""
        existing = self.path
        while not existing.exists():
            existing = existing.parent
        free = shutil.disk_usage(existing).free
        if free < needed_bytes:
            raise UserError(
                f"output_dir '{self.path}' has {free / 1e6:.0f} MB free, and the model to be saved there "
                f"needs {needed_bytes / 1e6:.0f} MB"
            )

    def hold(self, processes: int) -> None:
        """Become the run's newest life, on the main process; what an older one still appends is cut off.

        Raises:
            UserError, Superseded: see `RunLease.look`.
        """
        self.fence.take(processes=processes, slurm=slurm_ids())
        metrics = self.path / METRICS
        if metrics.is_file():
            self.fence.put(metrics, metrics.read_text("utf-8", errors="replace"))

    def begin(self, environment: dict[str, Any], metrics: str | None = None) -> None:
        """Write environment.json and recipe.yaml, each at one stroke, and begin the metrics.

        Args:
            environment: what is in effect.
            metrics: the lines of the checkpoint that this life goes on from; without one they are begun anew.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            # first: it says whose folder this is, should a kill come in between
            text = json.dumps({FINGERPRINT_KEY: self.recipe.fingerprint(), **environment}, indent=2)
            self.fence.put(self.path / ENVIRONMENT, text + "\n")
            self.fence.put(self.path / RECIPE, self.recipe.as_yaml())
            if metrics is None:
                (self.path / METRICS).unlink(missing_ok=True)
            else:
                self.fence.put(self.path / METRICS, metrics)
            if self.status is not None:
                self.status.reached(self.status.step)
        except OSError as error:
            raise UserError(f"output_dir '{self.path}' cannot be written: {error.strerror}") from error


def _read_environment(file: Path) -> dict[str, Any]:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(record, dict):
            raise ValueError("not a mapping")
        return record
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: choose another --output_dir or remove the folder") from error
