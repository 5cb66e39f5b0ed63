"""The names of classes that a data set's own features have: `datasets` keeps them in what it saves, and in Parquet."""

import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

ClassNames = dict[str, tuple[tuple[str, ...], ...]]  # by column, as `Source.class_names`


def class_names_of(features: Mapping[str, Any]) -> ClassNames:
    """The names of every column of a `datasets.Features` that is a ClassLabel, or a list of them."""
    inner = {column: getattr(feature, "feature", feature) for column, feature in features.items()}
    named = {column: getattr(feature, "names", None) for column, feature in inner.items()}
    return {column: (tuple(map(str, names)),) for column, names in named.items() if names}


def file_class_names(path: Path) -> ClassNames:
    """The same of a Parquet or Arrow file that `datasets` wrote; nothing where another program did, or it is broken."""
    arrow: Any = import_module("pyarrow")
    try:
        if path.suffix == ".parquet":
            schema = import_module("pyarrow.parquet").read_schema(path)
        elif path.suffix == ".arrow":
            ipc = import_module("pyarrow.ipc")
            with path.open("rb") as file:
                is_file = file.read(6) == b"ARROW1"
                file.seek(0)
                schema = (ipc.open_file if is_file else ipc.open_stream)(file).schema
        else:
            return {}
        metadata: dict[bytes, bytes] = schema.metadata or {}
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
        inner = {column: feature.get("feature", feature) for column, feature in features.items()}
        return {column: (tuple(map(str, feature["names"])),) for column, feature in inner.items() if "names" in feature}
    except (arrow.ArrowException, OSError, ValueError, KeyError, TypeError, AttributeError):  # its reader says more
        return {}
