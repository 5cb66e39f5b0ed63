"""What a folder that was given as a model really is, and whether it is the same one as before.

The project's own output given as its input is named as such.
"""

import hashlib
import json
from pathlib import Path

from isotune.io.files import digest_of_file
from isotune.io.run_files import RECIPE

ADAPTER_CONFIG = "adapter_config.json"
MODEL_CONFIG = "config.json"
# files of weights, configuration and tokenizer
MODEL_FILES = (".safetensors", ".bin", ".json", ".txt", ".model", ".tiktoken", ".jinja", ".skops")
PASSED_OVER = ("checkpoints", "export")  # folders beside a model that are no part of it


def why_no_model(name: str) -> str | None:
    """The sentence that says what the folder is and how to get a model out of it; None for a model or no folder.

    It may be a run, a checkpoint of one, or an adapter: of a run, or of any other program.
    """
    folder = Path(name)
    if not folder.is_dir() or (folder / MODEL_CONFIG).is_file():
        return None
    run = _run_of(folder)
    if run is not None and folder != run and folder.parent.name == "checkpoints":
        merged = run / "export" / f"{folder.name}-merged-safetensors"
        return f"'{name}' is a checkpoint of a run: `isotune export {folder} --merge` writes its model to {merged}"
    if run is not None and (run / "model" / ADAPTER_CONFIG).is_file() and folder in (run, run / "model"):
        what = "a run whose model is an adapter" if folder == run else f"the adapter of the run {run}"
        merged = run / "export" / "merged-safetensors"
        return f"'{name}' is {what}: `isotune export {run} --merge` merges it into its base, and {merged} is a model"
    if (folder / ADAPTER_CONFIG).is_file():
        merged = folder / "export" / "merged-safetensors"
        return (
            f"'{name}' is an adapter, not a model: `isotune export {folder} --merge` merges it into its base, and "
            f"{merged} is a model"
        )
    if run is not None and folder == run:
        if (run / "model").is_dir():
            return f"'{name}' is a run: its model is {run / 'model'}"
        return f"'{name}' is a run that has no model yet: its training has not finished"
    return None


def _run_of(folder: Path) -> Path | None:
    """The run that a folder is or belongs to."""
    candidates = (folder, folder.parent, folder.parent.parent)
    return next((candidate for candidate in candidates if (candidate / RECIPE).is_file()), None)


def digest_of_model(folder: Path) -> str:
    """SHA-256, in hexadecimal, of the names and contents of a model's and a tokenizer's files."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        place = path.relative_to(folder)
        is_part = not any(part.startswith(".") or part in PASSED_OVER for part in place.parts)
        if is_part and path.suffix in MODEL_FILES and path.is_file():
            digest.update(json.dumps(place.as_posix()).encode() + digest_of_file(path))
    return digest.hexdigest()
