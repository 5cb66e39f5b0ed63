"""Lines of metrics.jsonl as columns: a million of them take a hundred megabytes, and a sum over one key no time."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from isotune.io.run_files import LARGEST, is_finite_number

_CHUNK_LINES = 16_384
_ABSENT, _NULL, _WHOLE, _REAL, _OTHER = range(5)  # what a line has under a key
_MAX_WHOLE = 2**53  # larger ones are no float64, and are kept beside the columns


class StepLines(Mapping[int, dict[str, Any]]):
    """The lines by step, in the order of the steps; of a step that has several lines the last one.

    Under a key of which `is_number` is true, what is no finite number becomes null. `steps` are int64 [lines]. A line
    is made anew each time that it is asked for: ask for a `column` instead.
    """

    def __init__(
        self, lines: Iterable[dict[str, Any]] = (), is_number: Callable[[str], bool] = lambda key: False
    ) -> None:
        chunks = _Chunks(is_number)
        for line in lines:
            chunks.add(line)
        chunks.close()
        rows = np.concatenate([np.zeros(0, np.int64), *chunks.steps])
        order = np.argsort(rows, kind="stable")
        is_last = np.ones(len(rows), bool)
        is_last[:-1] = rows[order][1:] != rows[order][:-1]
        self._order = order[is_last]
        self.steps = rows[self._order]
        self._numbers = {key: np.concatenate(parts) for key, parts in chunks.numbers.items()}
        self._kinds = {key: np.concatenate(parts) for key, parts in chunks.kinds.items()}
        self._others = chunks.others

    def column(self, key: str) -> np.ndarray:
        """The numbers under a key, float64 [lines]; NaN where a line has no finite one."""
        if key == "step":
            return self.steps.astype(float)
        if key not in self._numbers:
            return np.full(len(self.steps), np.nan)
        numbers, kinds = self._numbers[key][self._order], self._kinds[key][self._order]
        is_number = ((kinds == _WHOLE) | (kinds == _REAL)) & np.isfinite(numbers)
        return np.where(is_number, numbers, np.nan)

    def has(self, key: str) -> np.ndarray:
        """Which lines have a key, bool [lines]."""
        if key not in self._kinds:
            return np.zeros(len(self.steps), bool)
        return self._kinds[key][self._order] != _ABSENT

    def total(self, key: str) -> float:
        """The sum under a key over all lines, whole where all numbers are."""
        column = self.column(key)
        total = float(column[~np.isnan(column)].sum())
        return int(total) if total.is_integer() else total

    @property
    def steps_of_lines(self) -> np.ndarray:
        """How many steps each line is of, int64 [lines]: `logging_steps` in the middle of a run."""
        return np.clip(np.nan_to_num(self.column("steps"), nan=1.0), 1, _MAX_WHOLE).astype(np.int64)

    @property
    def keys_of_lines(self) -> set[str]:
        """Every key of any line."""
        return {"step", *self._kinds}

    def _place(self, step: object) -> int | None:
        if not isinstance(step, int):
            return None
        place = int(np.searchsorted(self.steps, step))
        return place if place < len(self.steps) and self.steps[place] == step else None

    def __getitem__(self, step: int) -> dict[str, Any]:
        if (place := self._place(step)) is None:
            raise KeyError(step)
        row = int(self._order[place])
        line: dict[str, Any] = {"step": int(step)}
        for key, kinds in self._kinds.items():
            kind = kinds[row]
            if kind == _NULL:
                line[key] = None
            elif kind in (_WHOLE, _REAL):
                number = float(self._numbers[key][row])
                line[key] = int(number) if kind == _WHOLE else number
        return line | self._others.get(row, {})

    def __contains__(self, step: object) -> bool:
        return self._place(step) is not None

    def __iter__(self) -> Iterator[int]:
        return iter(self.steps.tolist())

    def __len__(self) -> int:
        return len(self.steps)


def steps_in_words(lines: StepLines, place: int) -> str:
    """What a line is of: `step`, or `50 steps`."""
    count = int(lines.steps_of_lines[place])
    return "step" if count == 1 else f"{count:,} steps"


class _Chunks:
    """Columns that grow by chunks of lines; a key that comes late is absent from the lines before it."""

    def __init__(self, is_number: Callable[[str], bool]) -> None:
        self.is_number = is_number
        self.steps: list[np.ndarray] = []
        self.numbers: dict[str, list[np.ndarray]] = {}
        self.kinds: dict[str, list[np.ndarray]] = {}
        self.others: dict[int, dict[str, Any]] = {}  # what is no number, by row
        self._rows = 0
        self._pending: list[dict[str, Any]] = []

    def add(self, line: dict[str, Any]) -> None:
        self._pending.append(line)
        if len(self._pending) == _CHUNK_LINES:
            self.close()

    def close(self) -> None:
        """Make a chunk of what was added since the last."""
        lines, self._pending = self._pending, []
        if not lines:
            return
        self.steps.append(np.array([line["step"] for line in lines], np.int64))
        for key in dict.fromkeys([*self.numbers, *(key for line in lines for key in line if key != "step")]):
            if key not in self.numbers:
                self.numbers[key] = [np.zeros(self._rows)]
                self.kinds[key] = [np.zeros(self._rows, np.uint8)]
            numbers, kinds = self._column(key, lines)
            self.numbers[key].append(numbers)
            self.kinds[key].append(kinds)
        self._rows += len(lines)

    def _column(self, key: str, lines: Sequence[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
        values = [line.get(key, self) for line in lines]
        types = set(map(type, values))
        if types == {float} and np.abs(numbers := np.array(values)).max() <= LARGEST:  # false of NaN too
            return numbers, np.full(len(values), _REAL, np.uint8)
        is_number = self.is_number(key)
        if types == {int} and min(values) >= -_MAX_WHOLE and max(values) <= _MAX_WHOLE:
            return np.array(values, float), np.full(len(values), _WHOLE, np.uint8)
        numbers, kinds = np.zeros(len(values)), np.zeros(len(values), np.uint8)
        for place, value in enumerate(values):
            if value is self:
                continue
            if value is None or (is_number and not is_finite_number(value)):
                kinds[place] = _NULL
            elif type(value) is float:
                numbers[place], kinds[place] = value, _REAL
            elif type(value) is int and -_MAX_WHOLE <= value <= _MAX_WHOLE:
                numbers[place], kinds[place] = value, _WHOLE
            else:
                kinds[place] = _OTHER
                self.others.setdefault(self._rows + place, {})[key] = value
        return numbers, kinds
