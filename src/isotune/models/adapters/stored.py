"""What an adapter's files say: its configuration, and which base model it belongs to."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict

from isotune.data.sources.hub import is_hub_id
from isotune.io.errors import UserError
from isotune.io.folders import ADAPTER_CONFIG
from isotune.io.reading import read_json
from isotune.io.run_files import RECIPE, or_refuse

OWN_BASE = "base_model"  # beside RUN/model, where the run has drawn the base's weights itself
LIBRARIES = ("transformers", "peft", "torch")  # whose classes a configuration may name

_Row = Annotated[int, Field(ge=0, le=2**31)]  # of an embedding


class _AutoMapping(TypedDict, total=False):
    parent_library: str | None


class _AdapterConfig(TypedDict, total=False):
    """The keys of adapter_config.json that are read here; the others are PEFT's to check."""

    peft_type: str
    task_type: str | None
    base_model_name_or_path: str | None
    revision: str | None
    auto_mapping: _AutoMapping | None
    trainable_token_indices: list[_Row] | dict[str, list[_Row]] | None


_SCHEMA = TypeAdapter(_AdapterConfig)


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The configuration of the adapter in a folder; UserError where it cannot be read, or asks for code of others."""
    file = folder / ADAPTER_CONFIG
    config: dict[str, Any] = dict(or_refuse(lambda each: read_json(each, _SCHEMA), file, f"{file} cannot be used"))
    mapping: dict[str, Any] = config.get("auto_mapping") or {}
    library = mapping.get("parent_library")
    if library and library.partition(".")[0] not in LIBRARIES:
        raise UserError(f"{file} names the class of its base in {library!r}: code that comes with a model is never run")
    return config


def brought_rows(config: dict[str, Any]) -> list[int]:
    """The rows of the embedding that the adapter brings, in order."""
    rows = config.get("trainable_token_indices") or {}
    return sorted({row for own in (rows.values() if isinstance(rows, dict) else [rows]) for row in own})


def find_base(folder: Path, model: Path, settings: dict[str, Any]) -> tuple[str, bool]:
    """The base of the adapter in `model`, a folder or Hub id, and whether the run in `folder` wrote it.

    It is RUN/base_model, or what the recipe (`settings`) names and the configuration too: an adapter is nothing on
    another base. Without a recipe it is what the configuration names. UserError where there is none, where the two
    differ, or a path leads out of the folder by `..`.
    """
    file, recipe = model / ADAPTER_CONFIG, folder / RECIPE
    config, own = read_adapter_config(model), folder / OWN_BASE
    if own.is_dir():
        return str(own), True
    asked, named = settings.get("model_name_or_path"), config.get("base_model_name_or_path")
    name = named or asked
    if not name:
        raise UserError(f"{file} names no base model, and neither does {recipe}")
    if asked and named and not _is_same(asked, named, folder, model) and not _is_drawn(settings, named):
        raise UserError(f"{file} names the base model {named!r}, and {recipe} {asked!r}: say the same in both")
    if name != asked and ".." in Path(name).parts:
        raise UserError(f"{file} names the base model {name!r}, which leads out of the folder: give its whole path")
    existing = _existing(name, folder, model)
    if existing is None and not is_hub_id(name):
        raise UserError(
            f"the base model of the adapter in {model} is not where it was: there is no folder {name}; put it there, "
            f"or say where it is in {file} (base_model_name_or_path)"
            + (f" and in {recipe} (model_name_or_path)" if asked else "")
        )
    return str(existing or name), False


def _existing(name: str, folder: Path, model: Path) -> Path | None:
    candidates = (Path(name).expanduser(), folder / name, model / name)
    return next((path for path in candidates if path.is_dir()), None)


def _is_same(asked: str, named: str, folder: Path, model: Path) -> bool:
    """Whether two names stand for one model."""
    places = [_existing(name, folder, model) for name in (asked, named)]
    return asked == named or (None not in places and len({place.resolve() for place in places if place}) == 1)


def _is_drawn(settings: dict[str, Any], named: str) -> bool:
    """Whether the recipe asks for new weights, and the configuration names the folder where a run keeps such."""
    drawn = settings.get("model_init") == "random" or str(settings.get("model_name_or_path")).startswith("builtin:")
    return drawn and Path(named).is_absolute() and Path(named).name == OWN_BASE
