"""What a folder that was given as a model really is, and whether it is the same one as before.

The project's own output given as its input is named as such.
"""

import hashlib
import json
from pathlib import Path

from isotune.io.files import digest_of_file
from isotune.io.folders import ADAPTER_CONFIG, MODEL_CONFIG, described, is_run, run_of

# files of weights, configuration and tokenizer
MODEL_FILES = (".safetensors", ".bin", ".json", ".txt", ".model", ".tiktoken", ".jinja", ".skops")
BASE_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")  # as transformers names them
WITH_ADAPTER = "a model with an adapter in it: merge the two, or move one away"
PASSED_OVER = ("checkpoints", "export")  # folders beside a model that are no part of it


def why_no_model(name: str) -> str | None:
    """The sentence that says what the path holds and how to get a model out of it; None for a model, or nothing.

    It may be a run, a checkpoint of one or another part, an adapter, of a run or of any other program, or a file.
    """
    folder = Path(name)
    if folder.is_file():
        return f"'{name}' is a file, and a model is a folder with {MODEL_CONFIG}"
    if not folder.is_dir():
        return None
    has_adapter = (folder / ADAPTER_CONFIG).is_file()
    if (folder / MODEL_CONFIG).is_file():
        if not has_adapter:
            return None
        if any(next(folder.glob(pattern), None) for pattern in BASE_WEIGHTS):
            # transformers would put the adapter into the model without a word
            return f"'{name}' is {WITH_ADAPTER}"
    run = run_of(folder)
    if run is not None and folder != run and folder.parent.name == "checkpoints":
        merged = run / "export" / f"{folder.name}-merged-safetensors"
        return f"'{name}' is a checkpoint of a run: `isotune export {folder} --merge` writes its model to {merged}"
    if run is not None and (run / "model" / ADAPTER_CONFIG).is_file() and folder in (run, run / "model"):
        what = "a run whose model is an adapter" if folder == run else f"the adapter of the run {run}"
        merged = run / "export" / "merged-safetensors"
        return f"'{name}' is {what}: `isotune export {run} --merge` merges it into its base, and {merged} is a model"
    if has_adapter:
        merged = folder / "export" / "merged-safetensors"
        return (
            f"'{name}' is an adapter, not a model: `isotune export {folder} --merge` merges it into its base, and "
            f"{merged} is a model"
        )
    if is_run(folder):
        if (folder / "model").is_dir():
            return f"'{name}' is a run: its model is {folder / 'model'}"
        return f"'{name}' is a run that has no model yet: its training has not finished"
    what = described(folder)
    if what is None:
        return f"'{name}' has no {MODEL_CONFIG}, so it is no model"
    model = f": its model is {run / 'model'}" if run is not None and (run / "model" / MODEL_CONFIG).is_file() else ""
    return f"'{name}' is {what}, and no model{model}"


def digest_of_model(folder: Path) -> str:
    """SHA-256, in hexadecimal, of the names and contents of a model's and a tokenizer's files."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        place = path.relative_to(folder)
        is_part = not any(part.startswith(".") or part in PASSED_OVER for part in place.parts)
        if is_part and path.suffix in MODEL_FILES and path.is_file():
            digest.update(json.dumps(place.as_posix()).encode() + digest_of_file(path))
    return digest.hexdigest()
