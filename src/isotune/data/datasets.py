"""Documents of a tokenised dataset of the `datasets` library, or of any sequence of rows with `input_ids`."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from isotune.data.documents import FIRST_TYPE, Documents, starts_of, sums_of
from isotune.io.errors import UserError

IGNORED = -100  # the label of a token that is not supervised
LABEL_COLUMNS = ("labels", "label", "label_ids")


def documents_of(dataset: Any, *, causal: bool, is_main: bool = True) -> tuple[Documents, bool]:
    """The rows as documents without padding, and whether they have targets.

    A row has `input_ids`; `attention_mask` 0 is padding, and is taken off. A causal model's `labels` are its input
    where there are none, else the input with -100 where nothing is supervised; a row without a supervised token is left
    out, which is said. A classifier's class is a whole number, in `labels`, `label` or `label_ids`. UserError names the
    row.
    """
    if not hasattr(dataset, "__len__"):
        raise UserError("a streaming dataset has no lengths to make a schedule of: take(n) of its rows into a Dataset")
    if len(dataset) == 0:
        raise UserError("the dataset holds no rows")
    names = tuple(dataset[0])
    if "input_ids" not in names:
        raise UserError(
            f"the rows have no input_ids, but {', '.join(names)}: tokenise them, or use SFTTrainer, which does"
        )
    ids, starts = _flat(dataset, "input_ids")
    kept = _flat(dataset, "attention_mask")[0] != 0 if "attention_mask" in names else np.ones(len(ids), np.bool_)
    lengths = sums_of(kept, starts)
    if not lengths.all():
        raise UserError(f"row {int(np.flatnonzero(lengths == 0)[0]) + 1} of the dataset has no token")
    key = next((name for name in LABEL_COLUMNS if name in names), None)
    without_padding = starts_of(lengths)
    numbers = np.arange(len(lengths))
    if not causal:
        labels = (
            np.zeros(len(lengths), np.int64) if key is None else np.asarray([row[key] for row in _rows(dataset, key)])
        )
        if labels.dtype.kind not in "iu" or labels.ndim != 1:
            raise UserError(f"the column {key!r} holds no class a row, which is a whole number")
        columns = {"ids": numbers}
        types = _flat(dataset, "token_type_ids")[0][kept] if "token_type_ids" in names else np.zeros(0, np.int32)
        if types.any():
            columns[FIRST_TYPE] = _first_types(types, without_padding)
        documents = Documents(ids[kept], labels.astype(np.int32), without_padding, numbers, columns)
        return documents, key is not None
    if "token_type_ids" in names and _flat(dataset, "token_type_ids")[0].any():
        raise UserError("token_type_ids of pairs are of classifiers: leave them out for a causal model")
    labels = _flat(dataset, key)[0][kept] if key == "labels" else ids[kept]
    supervised = labels != IGNORED
    supervised[without_padding[:-1]] = False  # nothing stands before it
    if bool((labels[supervised] != ids[kept][supervised]).any()):
        raise UserError("labels are other tokens than input_ids: a label is its own token, or -100")
    documents = Documents(ids[kept], supervised, without_padding, numbers, {"ids": numbers})
    silent = documents.supervised_counts == 0
    if silent.all():
        raise UserError("no row of the dataset has a supervised token")
    if silent.any() and is_main:
        print(f"note        {int(silent.sum()):,} of {len(silent):,} rows have no supervised token and are left out")
    return documents.select(~silent) if silent.any() else documents, True


def _first_types(types: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """How many tokens of each row are of type 0, int64 [rows]; UserError where others than 1 follow them."""
    changes = np.diff(types) < 0
    changes[starts[1:-1] - 1] = False  # from one row to the next
    if not set(np.unique(types).tolist()) <= {0, 1} or changes.any():
        raise UserError("token_type_ids are 0 for the first text of a row and 1 for the second: others are not known")
    return np.diff(starts) - sums_of(types, starts)


def _flat(dataset: Any, column: str) -> tuple[np.ndarray, np.ndarray]:
    """All values of a column of lists, end to end, and where each row begins and the last one ends."""
    values = [np.asarray(row[column]).reshape(-1) for row in _rows(dataset, column)]
    return np.concatenate(values).astype(np.int32), starts_of(np.array([len(value) for value in values], np.int64))


def _rows(dataset: Any, column: str) -> Sequence[Any]:
    """The rows with this column alone where the dataset can leave out the others, which saves most of the time."""
    if hasattr(dataset, "select_columns") and hasattr(dataset, "with_format"):
        return dataset.select_columns([column]).with_format("numpy")
    return [dataset[number] for number in range(len(dataset))]
