"""Documents of a tokenised dataset of the `datasets` library, or of any sequence of rows with `input_ids`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
from torch.utils.data import IterableDataset

from isotune.data.documents import FIRST_TYPE, Documents, starts_of, sums_of
from isotune.io.errors import UserError

IGNORED = -100  # the label of a token that is not supervised
COMPARED_ROWS = 4
LABEL_COLUMNS = ("labels", "label", "label_ids")
PADDING_LABELS = "labels of padding are left out, which the library would count in its loss"
CARRIED_COLUMNS = ("input_ids", "attention_mask", "token_type_ids", "seq_lengths", "position_ids")  # beside labels


def documents_of(
    dataset: Any,
    *,
    causal: bool,
    label_names: Sequence[str] = (),
    label_columns: Sequence[str] = LABEL_COLUMNS,
    masked_token: int | None = None,
    is_main: bool = True,
    keep_all: bool = False,
) -> tuple[Documents, np.ndarray | None, bool]:
    """The rows as documents without padding, a classifier's targets as the data has them, and whether there are any.

    A row has `input_ids`; `attention_mask` 0 is padding, and is taken off. A causal model's `labels` are its input
    where there are none, but for `masked_token`, else the input with -100 where nothing is supervised; unless
    `keep_all`, a row without a supervised token is left out, which is said. A row that is packed already, by
    `seq_lengths` as TRL writes them or by `position_ids` that begin anew, gives several documents, whose `source_rows`
    say which. A classifier's target is in the column of `label_column`: the documents have it where it is a class, a
    whole number. UserError names the row.
    """
    if is_streamed(dataset):
        raise UserError("a streaming dataset has no lengths to make a schedule of: take(n) of its rows into a Dataset")
    if len(dataset) == 0:
        raise UserError("the dataset holds no rows")
    dataset = _read_once(dataset, (*label_names, *label_columns))
    names = tuple(dataset[0])
    if "input_ids" not in names:
        raise UserError(
            f"the rows have no input_ids, but {', '.join(names)}: tokenise them, or use SFTTrainer, which does"
        )
    ids, starts = _flat(dataset, "input_ids")
    kept = _beside(dataset, "attention_mask", starts) != 0 if "attention_mask" in names else np.ones(len(ids), np.bool_)
    lengths = sums_of(kept, starts)
    if not lengths.all():
        raise UserError(f"row {int(np.flatnonzero(lengths == 0)[0]) + 1} of the dataset has no token")
    key = label_column(dataset[0], label_names, label_columns, causal=causal)
    without_padding, numbers = _document_starts(dataset, names, kept, starts_of(lengths)), np.arange(len(lengths))
    if len(without_padding) - 1 > len(lengths):
        if not causal:
            raise UserError("rows of several documents, by seq_lengths or position_ids, are of causal models")
        numbers = np.searchsorted(starts_of(lengths), without_padding[:-1], "right") - 1
    if not causal:
        targets = None if key is None else _targets(dataset, key)
        is_class = targets is not None and targets.ndim == 1 and targets.dtype.kind in "iu"
        labels = targets.astype(np.int32) if is_class and targets is not None else np.zeros(len(lengths), np.int32)
        columns = {"ids": numbers}
        types = _beside(dataset, "token_type_ids", starts)[kept] if "token_type_ids" in names else np.zeros(0, np.int32)
        if types.any():
            columns[FIRST_TYPE] = _first_types(types, without_padding)
        return Documents(ids[kept], labels, without_padding, numbers, columns), targets, key is not None
    if "token_type_ids" in names and _flat(dataset, "token_type_ids")[0].any():
        raise UserError("token_type_ids of pairs are of classifiers: leave them out for a causal model")
    labels = _beside(dataset, key, starts) if key is not None else np.where(ids == masked_token, IGNORED, ids)
    if key is not None and is_main and (padding := int(((labels != IGNORED) & ~kept).sum())):
        print(f"note        {padding:,} {PADDING_LABELS}")
    labels = labels[kept]
    supervised = labels != IGNORED
    supervised[without_padding[:-1]] = False  # nothing stands before it
    if bool((labels[supervised] != ids[kept][supervised]).any()):
        raise UserError("labels are other tokens than input_ids: a label is its own token, or -100")
    documents = Documents(ids[kept], supervised, without_padding, numbers, {"ids": numbers})
    silent = documents.supervised_counts == 0
    if keep_all:
        return documents, None, not silent.all()
    if silent.all():
        raise UserError("no row of the dataset has a supervised token")
    what = "rows" if len(documents) == len(dataset) else "documents"
    if silent.any() and is_main:
        print(f"note        {int(silent.sum()):,} of {len(silent):,} {what} have no supervised token and are left out")
    return documents.select(~silent) if silent.any() else documents, None, True


def is_streamed(dataset: Any) -> bool:
    """Whether rows come in their own order alone; one of PyTorch's may have a length all the same."""
    return not hasattr(dataset, "__len__") or isinstance(dataset, IterableDataset)


def label_column(
    row: Any, label_names: Sequence[str] = (), label_columns: Sequence[str] = LABEL_COLUMNS, *, causal: bool
) -> str | None:
    """The column of a row that holds its labels: the first of `label_names`, else the only one of `label_columns`.

    Of a causal model's row a single class is no label. UserError where there are several columns.
    """

    def is_label(name: str) -> bool:
        return name in row and (not causal or name == "labels" or np.ndim(row[name]) > 0)

    named = next((name for name in label_names if is_label(name)), None)
    if named is not None:
        return named
    found = [name for name in label_columns if is_label(name)]
    if len(found) > 1:
        raise UserError(
            f"the dataset has labels in {' and in '.join(found)}, and one of them is to be learnt: remove the others, "
            "or say label_names in the arguments"
        )
    return found[0] if found else None


def collated(dataset: Any, collator: Callable[[list[Any]], Any], *, is_main: bool = True) -> list[dict[str, Any]]:
    """Each row as a collator of the user's leaves it, which may mask labels, without the padding.

    UserError where a row depends on its neighbours in the batch, or on chance.
    """
    first = range(min(COMPARED_ROWS, len(dataset)))
    few = [dataset[number] for number in first]
    batch = collator(few)
    together = _unpadded(batch)
    again = _unpadded(collator([dataset[number] for number in first]))
    if together != again or together != [_unpadded(collator([row]))[0] for row in few]:
        raise UserError(
            "the data_collator, or the dataset, makes other rows of the same ones, by chance or by their neighbours: "
            "prepare the rows in the dataset"
        )
    if is_main and _learns_padding(batch):
        print(f"note        {PADDING_LABELS}")
    return [_unpadded(collator([dataset[number]]))[0] for number in range(len(dataset))]


def _read_once(dataset: Any, label_columns: Sequence[str]) -> Any:
    """A dataset of columns as it is; else its rows, each read once, so that its columns are of the same draw."""
    if _has_columns(dataset):
        return dataset
    rows = [dataset[number] for number in range(len(dataset))]
    columns = (*CARRIED_COLUMNS, *label_columns)
    for number, row in enumerate(rows[:COMPARED_ROWS]):
        again = dataset[number]
        if any(_plain(again[name]) != _plain(row[name]) for name in row if name in columns):
            raise UserError(
                f"the dataset makes another row {number + 1} each time it is read: prepare the rows in the dataset"
            )
    return rows


def _has_columns(dataset: Any) -> bool:
    """Whether columns can be read one by one: not where a function of `with_transform` makes them."""
    of_format: Any = getattr(dataset, "format", None) or {}
    by_column = hasattr(dataset, "select_columns") and hasattr(dataset, "with_format")
    return by_column and of_format.get("type") != "custom"


def _plain(value: Any) -> str:
    """All of a value: the text of an array leaves out the middle."""
    return str(value.tolist() if hasattr(value, "tolist") else value)


def _targets(dataset: Any, key: str) -> np.ndarray:
    """What a classifier's loss is made of, [rows, ...]: classes int64, or numbers; UserError for anything else."""
    cells = [np.asarray(row[key]) for row in _rows(dataset, key)]
    odd = next(
        (n for n, cell in enumerate(cells) if cell.dtype.kind not in "iufb" or cell.shape != cells[0].shape), None
    )
    if odd is not None:
        raise UserError(f"row {odd + 1} of the dataset has no class and no number in {key!r}, or another form of them")
    targets = np.stack(cells)
    targets = targets.astype(np.int64) if targets.dtype.kind in "bu" else targets
    if targets.dtype.kind == "i" and targets.ndim == 1 and not 0 <= targets.min() <= targets.max() < 2**31:
        wrong = int(np.flatnonzero((targets < 0) | (targets >= 2**31))[0])
        raise UserError(f"row {wrong + 1} of the dataset has the class {targets[wrong]}: a class is a number from 0")
    return targets


def _unpadded(batch: Any) -> list[dict[str, Any]]:
    """The rows of a batch of tensors, each without what its attention mask leaves out."""
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        raise UserError("the data_collator returns no input_ids: prepare the rows in the dataset")
    table = {name: np.asarray(values) for name, values in cast(Mapping[str, Any], batch).items()}
    mask = np.asarray(table.pop("attention_mask", np.ones_like(table["input_ids"]))) != 0
    by_token = {name for name, values in table.items() if values.shape == mask.shape}
    return [
        {name: (values[row][mask[row]] if name in by_token else values[row]).tolist() for name, values in table.items()}
        for row in range(len(mask))
    ]


def _learns_padding(batch: Mapping[str, Any]) -> bool:
    """Whether a batch of tensors has labels of tokens that its attention mask leaves out."""
    labels, mask = batch.get("labels"), batch.get("attention_mask")
    if labels is None or mask is None or np.shape(labels) != np.shape(mask):
        return False
    return bool(((np.asarray(labels) != IGNORED) & (np.asarray(mask) == 0)).any())


def _beside(dataset: Any, column: str, starts: np.ndarray) -> np.ndarray:
    """The values of a column that has one for each token; UserError names the first row that has not."""
    values, own = _flat(dataset, column)
    if (wrong := np.flatnonzero(own != starts)).size:
        raise UserError(f"row {int(wrong[0])} of the dataset has other numbers of {column} and of input_ids")
    return values


def _document_starts(dataset: Any, names: Sequence[str], kept: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Where each document starts and the last one ends, int64, where rows that start at `starts` may be packed.

    `kept` is bool [tokens of the columns]; starts and result count those that are kept.
    """
    if "seq_lengths" in names:
        lengths, of_rows = _flat(dataset, "seq_lengths")
        odd = (sums_of(lengths, of_rows) != np.diff(starts)) | (sums_of(lengths < 1, of_rows) > 0)
        if odd.any():
            raise UserError(f"row {int(np.argmax(odd)) + 1} of the dataset has seq_lengths of other input_ids")
        return starts_of(lengths)
    if "position_ids" not in names:
        return starts
    positions = _flat(dataset, "position_ids")[0]
    if len(positions) != len(kept):
        raise UserError("the dataset has other numbers of position_ids and of input_ids")
    positions = positions[kept]
    begins = np.union1d(np.flatnonzero(positions == 0), starts[:-1])
    within = np.append(begins, starts[-1])
    odd = positions != np.arange(len(positions)) - np.repeat(begins, np.diff(within))
    if odd.any():
        row = int(np.searchsorted(starts, np.argmax(odd), "right"))
        raise UserError(f"row {row} of the dataset has position_ids that do not count from 0 in each document")
    return within


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
    odd = next((n for n, value in enumerate(values) if value.dtype.kind not in "iubf"), None)
    if odd is not None:
        raise UserError(f"row {odd + 1} of the dataset has no whole numbers in {column!r}")
    return np.concatenate(values).astype(np.int32), starts_of(np.array([len(value) for value in values], np.int64))


def _rows(dataset: Any, column: str) -> Sequence[Any]:
    """The rows with this column alone where the dataset can leave out the others, which saves most of the time."""
    return dataset.select_columns([column]).with_format("numpy") if _has_columns(dataset) else dataset
