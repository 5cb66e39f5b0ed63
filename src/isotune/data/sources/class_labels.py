"""The names of classes that a data set's own features have: `datasets` keeps them in what it saves, and in Parquet."""

import unicodedata
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from isotune.data.sources.arrow_rows import IPC_FILE
from isotune.data.sources.text_files import open_seekable
from isotune.io.errors import UserError
from isotune.io.formats import format_of
from isotune.io.reading import parse_json

_UNSEEN = dict.fromkeys(map(ord, "\ufeff\u200b\u2060"))  # byte order marks and blanks without width
ClassNames = dict[str, tuple[tuple[str, ...], ...]]  # by column, as `Source.class_names`


def class_names_of(features: Mapping[str, Any]) -> ClassNames:
    """The names of every column of a `datasets.Features` that is a ClassLabel, or a list of them."""
    inner = {column: getattr(feature, "feature", feature) for column, feature in features.items()}
    named = {column: getattr(feature, "names", None) for column, feature in inner.items()}
    return {column: (tuple(map(str, names)),) for column, names in named.items() if names}


def features_class_names(features: Mapping[str, Any]) -> ClassNames:
    """The same of features as JSON writes them: in a file's metadata, and in dataset_info.json of `save_to_disk`."""
    # a feature, or that of the items of a list
    inner = {column: feature.get("feature", feature) for column, feature in features.items() if hasattr(feature, "get")}
    named = {column: own for column, own in inner.items() if hasattr(own, "get") and own.get("_type") == "ClassLabel"}
    return {column: (tuple(map(str, own.get("names") or ())),) for column, own in named.items() if own.get("names")}


def file_class_names(path: Path) -> ClassNames:
    """The same of a Parquet or Arrow file that `datasets` wrote; nothing where another program did, or it is broken."""
    kind = format_of(path)
    if kind not in (".parquet", ".arrow"):
        return {}
    arrow: Any = import_module("pyarrow")
    try:
        with open_seekable(path) as file:
            if kind == ".parquet":
                schema = import_module("pyarrow.parquet").read_schema(file)
            else:
                ipc = import_module("pyarrow.ipc")
                is_file = file.read(len(IPC_FILE)) == IPC_FILE
                file.seek(0)
                schema = (ipc.open_file if is_file else ipc.open_stream)(file).schema
        metadata: dict[bytes, bytes] = schema.metadata or {}
        return features_class_names(parse_json(metadata.get(b"huggingface", b"{}").decode())["info"]["features"])
    except (arrow.ArrowException, UserError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # its reader says more


def fold(name: object) -> str:
    """A name of a class as it is compared: without case, in Unicode's form NFKC, its white space single blanks."""
    text = str(name)
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text.translate(_UNSEEN).casefold())
    return " ".join(text.casefold().split())
