"""Which checkpoint a run resumes from: the newest valid one, or the one that the user named, of the same recipe."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isotune.checkpoint.manifest import InvalidCheckpoint, Manifest, read_manifest
from isotune.checkpoint.store import CheckpointStore, find_checkpoint
from isotune.config import RunRecipe
from isotune.config.run_recipe import RESUME_NEVER, RESUME_NEWEST
from isotune.distributed.collectives import call_on_main
from isotune.distributed.launch import Process
from isotune.io.errors import UserError
from isotune.run.run_dir import RunDir

STATE = "state.json"
TRAINER_STATE = "trainer_state.json"


@dataclass(frozen=True)
class Resumption:
    """A verified checkpoint of this recipe and data.

    Attributes:
        folder: directory of the checkpoint.
        state: content of its state.json.
        metrics: lines of metrics.jsonl up to its step.
    """

    folder: Path
    state: dict[str, Any]
    metrics: str

    @property
    def step(self) -> int:
        """Optimizer updates done."""
        return self.state["step"]


def find_resumption(
    store: CheckpointStore, recipe: RunRecipe, data_fingerprints: dict[str, str], process: Process
) -> Resumption | None:
    """Clean up after a killed attempt, choose the checkpoint to resume from, and print it; the main process decides.

    Returns:
        None where the run begins at its first step.

    Raises:
        UserError: the named checkpoint is not valid, or is of another recipe or other data.
    """

    def choose() -> Path | None:
        try:
            store.clean()
            return _choose(store, recipe, data_fingerprints)
        except OSError as error:
            raise UserError(f"{store.path} cannot be read: {error.strerror}") from error

    folder = call_on_main(process, choose)
    if folder is None:
        return None
    return Resumption(folder, json.loads((folder / STATE).read_text()), (folder / "metrics.jsonl").read_text())


def _choose(store: CheckpointStore, recipe: RunRecipe, data_fingerprints: dict[str, str]) -> Path | None:
    if recipe.resume == RESUME_NEVER:
        store.remove_all()
        return None
    if recipe.resume != RESUME_NEWEST:
        folder = Path(recipe.resume)
        try:
            manifest = find_checkpoint(folder)
        except InvalidCheckpoint as why:
            raise UserError(f"resume: {folder} is not a valid checkpoint: {why}") from why
    else:
        newest = store.newest_valid()
        for broken, why in newest.skipped:
            print(f"note        skipped {broken}: {why}", flush=True)
        if newest.folder is None or newest.manifest is None:
            return None
        folder, manifest = newest.folder, newest.manifest
    check_same_recipe(folder, manifest, recipe)
    _check_same_data(folder, manifest, recipe, data_fingerprints)
    print(
        f"resumed     after step {manifest.step}, from {folder} "
        f"(written by {manifest.engine} on {manifest.world_size})",
        flush=True,
    )
    return folder


def open_run(recipe: RunRecipe) -> RunDir:
    """The run directory of a recipe, once it and the checkpoint that `resume` names are checked.

    Raises:
        UserError, AlreadyDone, RunFault: see `check_named_checkpoint` and `RunDir.check_or_upload`.
    """
    check_named_checkpoint(recipe)
    run = RunDir(recipe)
    run.check_or_upload()
    return run


def check_named_checkpoint(recipe: RunRecipe) -> None:
    """Check the checkpoint that the user named, by its manifest alone, before any work is done.

    Raises:
        UserError: it is not a checkpoint, or of another recipe.
    """
    if recipe.resume in (RESUME_NEWEST, RESUME_NEVER):
        return
    folder = Path(recipe.resume)
    if (folder / "checkpoints").is_dir():
        raise UserError(f"resume: {folder} is a run: name one of the folders in {folder / 'checkpoints'}")
    if not folder.is_dir():
        raise UserError(f"resume: there is no folder {folder}; it takes auto, never or the folder of a checkpoint")
    try:
        manifest = read_manifest(folder)
    except InvalidCheckpoint as why:
        raise UserError(f"resume: {folder} is not a valid checkpoint: {why}") from why
    check_same_recipe(folder, manifest, recipe)


def check_same_recipe(folder: Path, manifest: Manifest, recipe: RunRecipe) -> None:
    """Check that a checkpoint's recipe agrees in every key that changes the result.

    Raises:
        UserError: names the keys that differ, and both values.
    """
    if manifest.recipe_fingerprint == recipe.fingerprint():
        return
    here = recipe.result_values()
    names = [name for name in {**manifest.recipe, **here} if manifest.recipe.get(name) != here.get(name)]
    differences = ", ".join(
        f"{name}: {manifest.recipe.get(name)} there, {here.get(name)} here" for name in sorted(names)
    )
    raise UserError(
        f"{folder} is a checkpoint of another recipe ({differences}): choose another --output_dir or --resume"
    )


def _check_same_data(folder: Path, manifest: Manifest, recipe: RunRecipe, fingerprints: dict[str, str]) -> None:
    for role, key in (("train", "dataset_name"), ("evaluation", "eval_dataset_name")):
        there, here = manifest.data_fingerprints.get(role), fingerprints.get(role)
        if there != here:
            raise UserError(
                f"{folder} is a checkpoint of other data: the contents of {key} "
                f"({getattr(recipe, key)}) have changed since; choose another --output_dir or --resume"
            )
