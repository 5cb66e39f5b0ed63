"""Which checkpoint a run resumes from: the newest valid one, or the one that the user named, of the same recipe."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isotune.checkpoint.manifest import Manifest, cannot_be_read, manifest_of, read_manifest, verify
from isotune.checkpoint.store import CheckpointStore
from isotune.config import RunRecipe
from isotune.config.run_recipe import RESUME_NEVER, RESUME_NEWEST
from isotune.distributed.launch import Process
from isotune.distributed.ranks import call_on_main
from isotune.io.errors import AlreadyDone, UserError
from isotune.io.run_files import or_empty, read_environment
from isotune.run.finishing import upload_missing
from isotune.run.identity import RunIdentity
from isotune.run.metrics_file import METRICS
from isotune.run.run_dir import CHECKPOINTS, RunDir
from isotune.run.run_lease import slurm_ids

STATE = "state.json"
TRAINER_STATE = "trainer_state.json"
RESUME = "resume: "  # begins the sentences about the checkpoint that it names


@dataclass(frozen=True)
class Resumption:
    """A verified checkpoint of this recipe and data: its directory, its state.json, and its metrics.jsonl."""

    folder: Path
    state: dict[str, Any]
    metrics: str

    @property
    def step(self) -> int:
        """Optimizer updates done."""
        return self.state["step"]


def as_requeued(recipe: RunRecipe) -> RunRecipe:
    """The recipe with `resume: auto` where this attempt of a SLURM job has checkpoints of an earlier one.

    A requeued job gives its first command again, which says what that attempt was to begin with.
    """
    job, run = slurm_ids(), Path(recipe.output_dir)
    if recipe.resume == RESUME_NEWEST or job is None or not job["restart"]:
        return recipe
    began: dict[str, Any] = or_empty(read_environment, run).get("slurm") or {}
    is_earlier = began.get("job_id") == job["job_id"] and began.get("restart") != job["restart"]
    if not (is_earlier and CheckpointStore(run / CHECKPOINTS).folders()):
        return recipe
    return recipe.with_values(resume=RESUME_NEWEST)


def open_run(recipe: RunRecipe, process: Process) -> RunDir:
    """The run directory of a recipe, once the main process has checked it and the checkpoint that `resume` names.

    Every rank calls it, and raises the same: UserError where that is no checkpoint or one of another recipe, and what
    `RunDir.check` does. The main process uploads a finished run whose requested upload is missing.
    """
    run = RunDir(recipe)
    try:
        run.is_trained = call_on_main(process, lambda: _check(run))
    except AlreadyDone as done:
        if process.is_main:
            upload_missing(run, done)
        raise
    return run


def _check(run: RunDir) -> bool:
    """Check RUN and the checkpoint that its recipe names; whether its training is over."""
    recipe = run.recipe
    if recipe.resume not in (RESUME_NEWEST, RESUME_NEVER):
        folder = Path(recipe.resume)
        if (folder / CHECKPOINTS).is_dir():
            raise UserError(f"{RESUME}{folder} is a run: name one of the folders in {folder / CHECKPOINTS}")
        if not folder.is_dir():
            raise UserError(f"{RESUME}there is no folder {folder}; it takes auto, never or the folder of a checkpoint")
        _check_same_recipe(folder, manifest_of(folder, read_manifest, RESUME), run)
    run.check()
    return run.is_trained


def find_resumption(
    store: CheckpointStore, run: RunDir, data_fingerprints: dict[str, str], process: Process
) -> Resumption | None:
    """Clean up after a killed attempt, choose the checkpoint to resume from, and print it; the main process decides.

    None where the run begins at its first step. Raises UserError where the named checkpoint is not valid, or is of
    another recipe or other data.
    """

    def choose() -> Path | None:
        try:
            store.clean()
            return _choose(store, run, data_fingerprints)
        except OSError as error:
            raise cannot_be_read(store.path, error) from error

    folder = call_on_main(process, choose)
    if folder is None:
        return None
    return Resumption(folder, json.loads((folder / STATE).read_text()), (folder / METRICS).read_text())


def _choose(store: CheckpointStore, run: RunDir, data_fingerprints: dict[str, str]) -> Path | None:
    recipe = run.recipe
    if recipe.resume == RESUME_NEVER:
        store.remove_all()
        return None
    if recipe.resume != RESUME_NEWEST:
        folder = Path(recipe.resume)
        manifest = manifest_of(folder, verify, RESUME)
    else:
        newest = store.newest_valid()
        for broken, why in newest.skipped:
            print(f"note        skipped {broken}: {why}", flush=True)
        if newest.folder is None or newest.manifest is None:
            return None
        folder, manifest = newest.folder, newest.manifest
    _check_same_recipe(folder, manifest, run)
    for role, name in (("train", "dataset_name"), ("evaluation", "eval_dataset_name")):
        mixture = name.replace("name", "mixture")
        key = mixture if recipe.values[mixture] else name
        if manifest.data_fingerprints.get(role) != data_fingerprints.get(role):
            raise UserError(
                f"{folder} is a checkpoint of other data: the contents of {key} "
                f"({recipe.values[name]}) have changed since; choose another --output_dir "
                "or --resume"
            )
    print(
        f"resumed     after step {manifest.step}, from {folder} "
        f"(written by {manifest.engine} on {manifest.world_size})",
        flush=True,
    )
    return folder


def _check_same_recipe(folder: Path, manifest: Manifest, run: RunDir) -> None:
    """Raise a UserError that names the keys that differ, of those that change the result, and both values."""
    if manifest.recipe_fingerprint in (run.identity.fingerprint, run.recipe.fingerprint()):
        return
    differences = run.identity.differences(RunIdentity(manifest.recipe, manifest.contents))
    if not differences:  # of a version that told runs apart by names alone
        return
    raise UserError(
        f"{folder} is a checkpoint of another recipe ({', '.join(differences.values())}): choose another --output_dir "
        "or --resume"
    )
