"""Which files of a model's repository on the Hub are read, and how transformers is told to read no others.

Left to itself, transformers asks for the newest commit each time, and for weights in a pickle it looks for a conversion
to safetensors in pull requests, downloads that too, or asks a service to make one. Conversions have lost tensors. Here
the files are those of one commit, fetched before transformers sees the name, which then reads the cache alone.
"""

import os
import re
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

from isotune.config import RunRecipe
from isotune.data.sources.hub import Repository, fetch, files_of, is_hub_id, open_repository
from isotune.data.sources.hub_access import hub_errors_named
from isotune.data.sources.source import PREFIX
from isotune.io.errors import UserError
from isotune.io.folders import described
from isotune.models.base.folder import BASE_WEIGHTS, WITH_ADAPTER, why_no_model

TEXT_SUFFIXES = (".json", ".txt", ".jinja", ".model", ".tiktoken")  # of configurations and tokenizers
WEIGHT_NAMES = (("model", "safetensors"), ("pytorch_model", "bin"))  # the first that is there is read


@dataclass(frozen=True)
class Located:
    """A model or tokenizer to open: its name or folder, arguments for `from_pretrained`, and weights in pickles."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict[str, Any])
    pickles: list[str] = field(default_factory=list[str])


def locate(name: str, what: str, revision: str | None = None, *, weights: bool = False) -> Located:
    """What `from_pretrained` is given for a folder or Hub id; the files of a Hub id are fetched where needed.

    `what` it is, a model or tokenizer, stands in the sentences of a UserError: there is no such folder or repository,
    it is a run or an adapter, the Hub and its cache are out of reach, or a file that is needed is not there. Weights
    are fetched by `weights`.
    """
    if os.path.isdir(name) or (os.path.exists(name) and not is_hub_id(name)):
        if revision is not None and os.path.isdir(name):
            raise UserError(f"model_revision is for Hub ids, and {name} is a folder")
        has_tokenizer = what == "tokenizer" and any(Path(name).glob("*token*.json"))
        if not has_tokenizer and (why := why_no_model(name)):
            is_unknown = what == "tokenizer" and described(name) is None
            raise UserError(f"'{name}' has no tokenizer.json, so it is no tokenizer" if is_unknown else why)
        return Located(name, {}, _pickles_in(Path(name)) if weights else [])
    if not is_hub_id(name):
        raise UserError(f"the {what} folder '{name}' does not exist")
    repository = open_repository("model", name, revision)
    with hub_errors_named("model", name, revision):
        fetch(repository, "texts", partial(_choose_texts, repository, what))
        files = fetch(repository, "weights", partial(_choose_weights, repository))["files"] if weights else []
    pickles = [file for file in files if file.endswith(".bin")]
    arguments: dict[str, Any] = {"revision": repository.commit, "local_files_only": True}
    if weights:
        os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"  # transformers would start it for files in the cache too
        arguments["use_safetensors"] = not pickles
    return Located(repository.name, arguments, pickles)


def commit_of_base(recipe: RunRecipe) -> str | None:
    """The commit that the base model of a recipe is read at; None for what is on no Hub."""
    name = recipe.model_name_or_path
    if recipe.model_init == "random" or name.startswith(PREFIX) or os.path.isdir(name):
        return None
    return open_repository("model", name, recipe.model_revision).commit


def _choose_texts(repository: Repository, what: str, ask_hub: bool) -> dict[str, Any]:
    names = files_of(repository, ask_hub)
    files = [
        name
        for name in names
        if ("/" not in name or re.fullmatch(r"additional_chat_templates/[^/]+\.jinja", name))
        and name.endswith(TEXT_SUFFIXES)
        and not name.endswith(".index.json")
    ]
    if "adapter_config.json" in files and (what == "model" or "config.json" not in files):
        if "config.json" in files and any(fnmatch(name, pattern) for name in names for pattern in BASE_WEIGHTS):
            raise UserError(f"{repository.what} is {WITH_ADAPTER}")
        raise UserError(f"{repository.what} is an adapter, not a whole model: name the base that it was trained on")
    if what == "model" and "config.json" not in files:
        raise UserError(f"{repository.what} has no config.json: {_listed(names, ask_hub)}")
    return {"files": files}


def _choose_weights(repository: Repository, ask_hub: bool) -> dict[str, Any]:
    names = files_of(repository, ask_hub)
    for stem, suffix in WEIGHT_NAMES:
        whole, index = f"{stem}.{suffix}", f"{stem}.{suffix}.index.json"
        if whole in names:
            return {"files": [whole]}
        if index in names:
            return {"files": [index, *(name for name in names if re.fullmatch(rf"{stem}-\d+-of-\d+\.{suffix}", name))]}
    readable = " nor ".join(f"{stem}.{suffix}" for stem, suffix in WEIGHT_NAMES)
    raise UserError(f"{repository.what} has neither {readable}, whole or in shards: {_listed(names, ask_hub)}")


def _listed(names: list[str], ask_hub: bool) -> str:
    return f"{'it has' if ask_hub else 'the cache has'} {', '.join(names) or 'nothing'}"


def _pickles_in(folder: Path) -> list[str]:
    """The pickled weights that a folder's model is read from: none where there are safetensors."""
    if any(folder.glob("*.safetensors")):
        return []
    return sorted(path.name for path in folder.glob("pytorch_model*.bin"))
