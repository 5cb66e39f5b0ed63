"""What a run goes on from: the newest checkpoint that is whole, or the one that the user named, of the same recipe."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from isotune.checkpoint.manifest import InvalidCheckpoint, Manifest, read_manifest
from isotune.checkpoint.store import CheckpointStore, find_checkpoint
from isotune.config import RunRecipe
from isotune.config.run_recipe import RESUME_NEVER, RESUME_NEWEST
from isotune.distributed.launch import Process
from isotune.io.errors import UserError
from isotune.run.run_dir import RunDir

STATE = "state.json"
TRAINER_STATE = "trainer_state.json"


@dataclass(frozen=True)
class Resumption:
    """A verified checkpoint of this experiment.

    Attributes:
        folder: where it lies.
        state: its state.json.
        metrics: the metrics lines up to its step, as they were written.
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
    """Clean up after a killed life, choose what to go on from, and say it; the main process decides for all.

    Returns:
        None where the run begins at its first step.

    Raises:
        UserError: the checkpoint that was named is not whole, or is of another recipe or other data.
    """
    answer: list[Any] = [None]
    if process.is_main:
        try:
            store.clean()
            answer = [_choose(store, recipe, data_fingerprints)]
        except UserError as error:
            answer = [error]
        except OSError as error:
            answer = [UserError(f"{store.path} cannot be read: {error.strerror}")]
    if process.world_size > 1:
        dist.broadcast_object_list(answer, src=0, device=process.device)
    if isinstance(answer[0], UserError):
        raise answer[0]
    if answer[0] is None:
        return None
    folder = Path(answer[0])
    return Resumption(folder, json.loads((folder / STATE).read_text()), (folder / "metrics.jsonl").read_text())


def _choose(store: CheckpointStore, recipe: RunRecipe, data_fingerprints: dict[str, str]) -> str | None:
    if recipe.resume == RESUME_NEVER:
        store.forget_all()
        return None
    if recipe.resume != RESUME_NEWEST:
        folder = Path(recipe.resume)
        try:
            manifest = find_checkpoint(folder)
        except InvalidCheckpoint as why:
            raise UserError(f"resume: {folder} is no whole checkpoint: {why}") from why
    else:
        choice = store.newest_valid()
        for broken, why in choice.passed_over:
            print(f"note        passed over {broken}: {why}", flush=True)
        if choice.folder is None or choice.manifest is None:
            return None
        folder, manifest = choice.folder, choice.manifest
    check_same_recipe(folder, manifest, recipe)
    _check_same_data(folder, manifest, recipe, data_fingerprints)
    print(
        f"resumed     after step {manifest.step}, from {folder} "
        f"(written by {manifest.engine} on {manifest.world_size})",
        flush=True,
    )
    return str(folder)


def open_run(recipe: RunRecipe) -> RunDir:
    """The run directory of a recipe, once it and the checkpoint that `resume` names have been looked at.

    Raises:
        UserError, AlreadyDone, RunFault: see `check_named_checkpoint` and `RunDir.check_or_upload`.
    """
    check_named_checkpoint(recipe)
    run = RunDir(recipe)
    run.check_or_upload()
    return run


def check_named_checkpoint(recipe: RunRecipe) -> None:
    """Look at the checkpoint that the user named, without reading all of it, before any work is done.

    Raises:
        UserError: it is none, or of another recipe.
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
        raise UserError(f"resume: {folder} is no whole checkpoint: {why}") from why
    check_same_recipe(folder, manifest, recipe)


def check_same_recipe(folder: Path, manifest: Manifest, recipe: RunRecipe) -> None:
    """Refuse a checkpoint whose recipe differs in a key that changes the result.

    Raises:
        UserError: names the keys and both values.
    """
    if manifest.recipe_fingerprint == recipe.fingerprint():
        return
    here = recipe.result_values()
    names = [name for name in {**manifest.recipe, **here} if manifest.recipe.get(name) != here.get(name)]
    said = ", ".join(f"{name}: {manifest.recipe.get(name)} there, {here.get(name)} here" for name in sorted(names))
    raise UserError(f"{folder} is a checkpoint of another recipe ({said}): choose another --output_dir or --resume")


def _check_same_data(folder: Path, manifest: Manifest, recipe: RunRecipe, fingerprints: dict[str, str]) -> None:
    for role, key in (("train", "dataset_name"), ("evaluation", "eval_dataset_name")):
        there, here = manifest.data_fingerprints.get(role), fingerprints.get(role)
        if there != here:
            raise UserError(
                f"{folder} is a checkpoint of other data: the contents of {key} "
                f"({getattr(recipe, key)}) have changed since; choose another --output_dir or --resume"
            )
