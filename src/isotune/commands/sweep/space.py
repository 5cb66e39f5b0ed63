"""What a sweep searches: `--learning_rate 1e-5..1e-4` is a range, `--warmup_steps 0,100` a list, any other flag fixed.

A range takes what its key takes: whole numbers stay whole. Its scale is logarithmic for a learning rate, and wherever
both ends are positive and the larger is at least ten times the smaller.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from isotune.config.layers import ALIASES
from isotune.config.schema import Key, parse, takes
from isotune.io.errors import UserError, shown

TO = ".."
LOG_RATIO = 10.0
ALWAYS_LOG = "learning_rate"
# keys that decide which rows are learnt or evaluated, or what they mean: values under two of them cannot be compared
DECIDE_ROWS = ("dataset_", "eval_")
DECIDE_LABELS = frozenset(
    ("task_type", "label_source", "label_names", "num_labels", "label_thresholds", "clean_text", "drop_leaked")
)
# of a language model, and the tokens that its loss is a mean of
DECIDE_TOKENS = frozenset({"train_on", "overlong", "chat_format", "max_seq_length", "add_tokens"})
DECIDE_TOKENS |= {"model_name_or_path", "tokenizer_name_or_path"}
SETTINGS_IN_ONE_TEXT = frozenset(("optim_args",))  # NAME=VALUE,NAME=VALUE

Values = dict[str, Any]


@dataclass(frozen=True)
class Axis:
    """The values of one key that are searched: those of a list, or all between two ends.

    Attributes:
        choices: of a list; empty of a range.
        log: whether equal steps are equal ratios.
    """

    key: str
    choices: tuple[Any, ...] = ()
    low: float = 0
    high: float = 0
    log: bool = False

    @property
    def size(self) -> int | None:
        """How many values there are; None where they are real numbers."""
        if self.choices:
            return len(self.choices)
        return int(self.high - self.low) + 1 if isinstance(self.low, int) else None

    def all_values(self) -> Sequence[Any]:
        """Every value of an axis that has a size."""
        return self.choices or range(int(self.low), int(self.high) + 1)

    def distribution(self) -> Any:
        """This axis as Optuna has it."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.choices:
            return CategoricalDistribution(self.choices)
        if isinstance(self.low, int):
            return IntDistribution(self.low, int(self.high), log=self.log)
        return FloatDistribution(self.low, self.high, log=self.log)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        if self.choices:
            return {"choices": list(self.choices)}
        return {"low": self.low, "high": self.high, "log": self.log}


def split_flags(
    flags: Mapping[str, Sequence[str]], keys: Mapping[str, Key]
) -> tuple[list[Axis], dict[str, Sequence[str]]]:
    """The searched keys of a command line, and its other flags; UserError for a wrong range or list."""
    axes: list[Axis] = []
    fixed: dict[str, Sequence[str]] = {}
    for written, words in flags.items():
        name = ALIASES.get(written, written)
        key = keys.get(name)
        text = words[0] if len(words) == 1 else ""
        if key is None or not _is_searched(key, text):
            fixed[written] = words
            continue
        if any(axis.key == name for axis in axes):
            raise UserError(f"--{written} is another name of --{name}: keep one of them")
        _check_key(key, written, of_tokens="train_on" in keys)
        axes.append(_range(key, written, text) if TO in text else _list(key, written, text))
    return axes, fixed


def grid(axes: Sequence[Axis], most: int) -> list[Values] | None:
    """Every combination, where there are at most so many; None where there are more."""
    count = 1
    for axis in axes:
        if (size := axis.size) is None or (count := count * size) > most:
            return None
    names = [axis.key for axis in axes]
    return [dict(zip(names, values, strict=True)) for values in product(*(axis.all_values() for axis in axes))]


def _is_searched(key: Key, text: str) -> bool:
    """Whether a text is a range or a list of values, and no value of the key itself."""
    if takes(key, list, tuple, dict) or key.name in SETTINGS_IN_ONE_TEXT:
        return False
    if takes(key, str) and not key.changes_result:
        return False
    return (TO in text and takes(key, int, float)) or "," in text


def _check_key(key: Key, written: str, *, of_tokens: bool) -> None:
    if key.name == "seed":
        raise UserError("--seed is not searched: --seeds says how many seeds each trial has")
    if key.name.startswith(DECIDE_ROWS) or key.name in DECIDE_LABELS:
        raise UserError(f"--{written} is not searched: it decides the rows or labels, and trials are compared on them")
    if of_tokens and key.name in DECIDE_TOKENS:
        raise UserError(f"--{written} is not searched: it decides the tokens that the loss of a trial is a mean of")
    if not key.changes_result:
        raise UserError(f"--{written} is not searched: the result does not depend on it")


def _value(key: Key, written: str, text: str, part: str) -> Any:
    try:
        return parse(key, part)
    except ValueError as error:
        raise UserError(f"--{written} is {shown(text, 80)}, and {shown(part)} is no value of it: {error}") from None


def _range(key: Key, written: str, text: str) -> Axis:
    parts = text.split(TO)
    if len(parts) != 2 or not all(parts):
        raise UserError(f"--{written} is {shown(text, 80)}: a range is two numbers, LOW{TO}HIGH")
    low, high = (_value(key, written, text, part) for part in parts)
    for part, end in zip(parts, (low, high), strict=True):
        if isinstance(end, bool) or not isinstance(end, int | float):
            raise UserError(f"--{written} is {shown(text, 80)}, and {shown(part)} is no number")
    if low >= high:
        raise UserError(f"--{written} is {shown(text, 80)}: the range is empty, its first number is the smaller one")
    if key.step_count and low < 1 <= high and low != 0:
        raise UserError(
            f"--{written} is {shown(text, 80)}: {low:g} is a share of the run and {high:g} a number of steps"
        )
    if key.step_count and high < 1:
        low, high = float(low), float(high)
    log = low > 0 and (key.name == ALWAYS_LOG or high / low >= LOG_RATIO)
    return Axis(key.name, low=low, high=high, log=log)


def _list(key: Key, written: str, text: str) -> Axis:
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise UserError(f"--{written} is {shown(text, 80)}: a value of the list is empty")
    values = [_value(key, written, text, part) for part in parts]
    if len({*values}) < len(values):
        raise UserError(f"--{written} is {shown(text, 80)}: a value stands twice")
    return Axis(key.name, choices=tuple(values))
