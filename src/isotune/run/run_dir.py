"""RUN, the directory of one run: checked before anything is written, and never shared with another run."""

import json
import os
import shutil
import sys
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from isotune.config import RunRecipe
from isotune.config.run_recipe import RESUME_NEWEST
from isotune.io.errors import AlreadyDone, UserError
from isotune.io.files import set_aside
from isotune.io.reading import Unreadable, open_file
from isotune.io.run_files import (
    ENVIRONMENT,
    LOGS_DIR,
    RECIPE,
    or_empty,
    read_environment,
    read_recipe_values,
    read_status,
)
from isotune.run.identity import RunIdentity
from isotune.run.metrics_file import METRICS
from isotune.run.run_lease import RunLease, slurm_ids

FINGERPRINT_KEY, IDENTITY = "recipe_fingerprint", "identity"
CHECKPOINTS = "checkpoints"
WEIGHTS_SUFFIX = ".safetensors"


class LeasedDir:
    """A run directory that one attempt writes to at a time: its place, its lease and its status."""

    again = "the same command"  # goes on with a run that was stopped

    def __init__(self, path: Path) -> None:
        self.path, self.model = path, path / "model"  # or adapter
        self.status: Any = None  # the `RunStatus` while the run is supervised
        self.lease = RunLease(path)
        self.is_trained = False  # training is over, and what comes after it is not

    def acquire_lease(self, processes: int) -> Path:
        """Acquire the lease, on the main process; returns the directory of this attempt.

        A copy replaces metrics.jsonl, so that a stale attempt, which has the file open, no longer appends to it.
        """
        folder = self.lease.acquire(processes=processes, slurm=slurm_ids())
        try:
            if (metrics := self._open_metrics()) is not None:
                with metrics:
                    self.lease.write_file(self.path / METRICS, metrics.read().decode("utf-8", "replace"))
            self.lease.reserve()
        except BaseException:
            self.lease.release()
            raise
        return folder

    def _open_metrics(self) -> BinaryIO | None:
        """metrics.jsonl to read, None where there is none; UserError for a pipe, or a link that leads out of RUN.

        An attempt copies the file into RUN and adds lines to it, so whoever made such a link would get another file.
        """
        file = self.path / METRICS
        try:
            return open_file(file, sys.maxsize, self.path)
        except FileNotFoundError:
            return None
        except Unreadable as reason:
            raise UserError(f"{reason.of(file)}: put the file itself there, or remove it") from None

    def write_first_files(self, environment: dict[str, Any], recipe: str, metrics: str | None) -> None:
        """Write environment.json and recipe.yaml, each atomically, and begin metrics.jsonl.

        `metrics` are its first lines; None removes those of an earlier run. UserError where RUN cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            # environment.json first: it identifies the run, should the process be killed before recipe.yaml
            self.lease.write_file(self.path / ENVIRONMENT, json.dumps(environment, indent=2) + "\n")
            self._make_way()
            self.lease.write_file(self.path / RECIPE, recipe)
            if metrics is None:
                (self.path / METRICS).unlink(missing_ok=True)
            else:
                self.lease.write_file(self.path / METRICS, metrics)
            if self.status is not None:
                self.status.reached(self.status.step)
        except OSError as error:
            raise UserError(f"output_dir '{self.path}' cannot be written: {error.strerror}") from error

    def _make_way(self) -> None:
        """What else is of an earlier run and must not be taken for this one's."""


class RunDir(LeasedDir):
    """RUN of a recipe: `check` changes nothing, `begin` writes the first files."""

    def __init__(self, recipe: RunRecipe) -> None:
        super().__init__(Path(recipe.output_dir))
        self.recipe, self.again = recipe, recipe.again
        self.base_model = self.path / "base_model"  # one that exists nowhere else: its weights were drawn at random
        self._has_begun = False  # by `begin`, which the main process calls

    def check(self) -> None:
        """Check that this recipe may run here, before any work is done; the main process calls it.

        Raises UserError where RUN holds another recipe's run or something else, cannot be written, or is in use, and
        AlreadyDone where the run is finished, all that it made is there, and `resume` does not ask for a new one.
        `is_trained` is true where only steps after training are left.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"output_dir '{self.path}' is a file")
        existing = self._existing_parent()
        if not os.access(existing, os.W_OK | os.X_OK):
            raise UserError(f"output_dir '{self.path}' cannot be written: no permission in {existing}")
        checkpoints = self.path / CHECKPOINTS
        if checkpoints.exists() and checkpoints.stat().st_dev != self.path.stat().st_dev:
            raise UserError(
                f"{checkpoints} is on another file system than output_dir '{self.path}', and no checkpoint can be "
                "renamed into it: put output_dir itself there"
            )
        self.lease.check_available()
        # names with a dot: files that an attempt was still writing when it was killed; its log may be all that it left
        if not self.path.is_dir() or all(p.name.startswith(".") or p.name == LOGS_DIR for p in self.path.iterdir()):
            return
        recorded = self.path / ENVIRONMENT
        if not recorded.is_file():
            raise UserError(f"output_dir '{self.path}' is not empty and holds no run: choose another --output_dir")
        try:
            earlier = read_environment(self.path)
        except Unreadable as reason:
            raise UserError(
                f"{recorded} cannot be read: {reason}; choose another --output_dir or remove the folder"
            ) from reason
        self._check_same_run(earlier)
        if (metrics := self._open_metrics()) is not None:
            metrics.close()
        if self.model.is_dir() and self.recipe.resume == RESUME_NEWEST:
            status = or_empty(read_status, self.path)
            if status.get("status") == "finished" and self._has(status.get("made", {})):
                raise AlreadyDone(
                    f"output_dir '{self.path}' holds the finished run of this recipe: nothing is left to do "
                    "(--resume never runs it again from the start)"
                )
            self.is_trained = not self.recipe.plan_only

    def _has(self, made: dict[str, int]) -> bool:
        """Whether the files are there that the end of the run made, weights with all their bytes."""
        for name, size in made.items():
            file = self.path / name
            if not file.is_file() or (file.suffix == WEIGHTS_SUFFIX and file.stat().st_size != size):
                return False
        return True

    @cached_property
    def identity(self) -> RunIdentity:
        """What makes another run the same as this one; the first call reads every local file that the recipe names."""
        return RunIdentity.of(self.recipe)

    def _check_same_run(self, earlier: dict[str, Any]) -> None:
        """Raise a UserError unless the run that is here, by its environment.json, is of this recipe and content."""
        if earlier.get(FINGERPRINT_KEY) in (self.identity.fingerprint, self.recipe.fingerprint()):
            return
        recorded = earlier.get(IDENTITY)
        if recorded is not None:
            differences = self.identity.differences(RunIdentity(**recorded))
            if not differences:
                return  # the files of the earlier run are gone, and their names are the same
            why = f" ({next(iter(differences.values()))})"
        else:
            why = self._differing_key()
        raise UserError(
            f"output_dir '{self.path}' holds the run of another recipe{why}: choose another --output_dir or remove it"
        )

    def _differing_key(self) -> str:
        """The first key that differs, where an earlier version recorded nothing but recipe.yaml."""
        earlier = or_empty(read_recipe_values, self.path)
        for key, value in self.recipe.result_values().items():
            if key in earlier and earlier[key] != value:
                return f" ({key}: {earlier[key]} there, {value} here)"
        return ""

    def _existing_parent(self) -> Path:
        return next(path for path in (self.path, *self.path.parents) if path.exists())

    def check_room(self, needed_bytes: int) -> None:
        """Raise a UserError where the disk has no room for the model at the end of training."""
        free = shutil.disk_usage(self._existing_parent()).free
        if free < needed_bytes:
            raise UserError(
                f"output_dir '{self.path}' has {free / 1e6:.0f} MB free, and the model to be saved there "
                f"needs {needed_bytes / 1e6:.0f} MB"
            )

    def begin(self, environment: dict[str, Any], metrics: str | None = None) -> None:
        """Write the first files of the run, with its identity.

        `metrics` are the lines of the checkpoint that this attempt resumes from; None removes those of an earlier one.
        Raises UserError where RUN cannot be written.
        """
        own = {FINGERPRINT_KEY: self.identity.fingerprint, IDENTITY: asdict(self.identity)}
        self.write_first_files({**own, **environment}, self.recipe.as_yaml(), metrics)
        self._has_begun = True

    def _make_way(self) -> None:
        set_aside(self.model)  # where this run replaces another; its new model removes the old one

    def record(self, **found: Any) -> None:
        """Values of the recipe that were found on the way, and that nobody gave; on every rank."""
        self.recipe = self.recipe.with_values(**found)
        if self._has_begun:
            self.lease.write_file(self.path / RECIPE, self.recipe.as_yaml())
