"""What a folder or file that was given really is: output of this program given as its input is named as such."""

import os
from pathlib import Path

from isotune.io.run_files import RECIPE, STATUS

ADAPTER_CONFIG, MODEL_CONFIG = "adapter_config.json", "config.json"
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


def expanded(name: str | os.PathLike[str]) -> Path:
    """A path whose `~` is a home folder; it stays where nobody knows that user, so that nothing is there."""
    return Path(os.path.expanduser(name))


def run_of(folder: Path) -> Path | None:
    """The run that a folder is or belongs to."""
    folder = Path(os.path.normpath(folder))  # whose parents are its own, where it goes up and down again
    candidates = (folder, folder.parent, folder.parent.parent)
    return next((candidate for candidate in candidates if is_run(candidate)), None)


def is_run(folder: Path) -> bool:
    """Whether a folder is a run, finished or not; a recipe alone may lie beside anybody's data."""
    parts = (folder / STATUS, folder / "model", folder / "checkpoints")
    return (folder / RECIPE).is_file() and any(part.exists() for part in parts)


def described(name: str | os.PathLike[str]) -> str | None:
    """What a path holds, as a sentence goes on with it: a run, a part of one, a model, an adapter, a result, a file.

    None where there is nothing, or a folder that none of these is.
    """
    folder = expanded(name)
    if folder.is_file():
        return "a file"
    run = run_of(folder)
    whose = "" if run is None or run == folder else f" of the run {run}"
    if is_run(folder):
        return "a run"
    if (folder / "MANIFEST.json").is_file():
        return f"a checkpoint{whose}"
    if (folder / "metrics.json").is_file() and (folder / "predictions.jsonl").is_file():
        return f"the result of an evaluation{whose}"
    if (folder / ADAPTER_CONFIG).is_file():
        return f"an adapter{whose}"
    if (folder / MODEL_CONFIG).is_file() and any(next(folder.glob(pattern), None) for pattern in _WEIGHTS):
        return f"a model{whose}"
    return f"a folder{whose}" if whose and folder.is_dir() else None
