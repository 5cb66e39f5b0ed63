"""What may be said of a run on the Chatbot Arena: by an encoder, or by classical baselines."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from isotune.config.command_line import read_flags
from isotune.config.layers import Layer, settle
from isotune.config.recipe_file import read_file, write_file
from isotune.config.recipes import ClassificationRecipe
from isotune.config.schema import DATA, GROUPS, MODEL, OUTPUT, REQUIRED, SCHEDULE, SHARE, Key, Need, Range, key, keys_of

_FOLDER = "folder with the competition's train.csv, test.csv and sample_submission.csv"
_LABELS = "file that says who won in test.csv, to score the finished predictions once; the competition keeps it"
_OWN_COLUMNS = Need(lambda values: False, "the Arena's files have their own columns, classes and split")


@dataclass(frozen=True, kw_only=True)
class ArenaRecipe(ClassificationRecipe):
    """A recipe of an encoder that reads a prompt and both answers, and says which one people prefer."""

    method: Literal["encoder"] = key("encoder", MODEL, "what predicts: encoder, or baselines in a recipe of their own")
    dataset_name: str = key(REQUIRED, DATA, _FOLDER, is_path=True)
    test_labels: str | None = key(None, DATA, _LABELS, is_path=True, changes_result=False)
    train_orders: Literal["both", "one"] = key(
        "both", DATA, "orders of the two answers to learn from: both, or for each row one by a coin of its content"
    )
    eval_split_share: float = key(
        0.1, DATA, "share of the prompts that is kept for evaluation, chosen by content and seed", allowed=SHARE
    )
    num_labels: int | None = key(3, DATA, "a wins, b wins, tie", allowed=Range(3, 3), common=False)
    dataset_split: str = key("train", DATA, "not used", needs=_OWN_COLUMNS, common=False)
    eval_dataset_name: str | None = key(None, DATA, "not used", needs=_OWN_COLUMNS, common=False)
    eval_dataset_split: str = key("test", DATA, "not used", needs=_OWN_COLUMNS, common=False)
    dataset_text_field: str = key("text", DATA, "not used", needs=_OWN_COLUMNS, common=False)
    dataset_label_field: str = key("label", DATA, "not used", needs=_OWN_COLUMNS, common=False)
    dataset_id_field: str | None = key(None, DATA, "not used", needs=_OWN_COLUMNS, common=False)
    clean_text: bool = key(False, DATA, "not used", needs=_OWN_COLUMNS, common=False)
    label_source: Literal["column"] = key("column", DATA, "not used", needs=_OWN_COLUMNS, common=False)
    drop_leaked: bool = key(False, DATA, "not used", needs=_OWN_COLUMNS, common=False)
    sentences: tuple[str, ...] | None = key(None, OUTPUT, "not used", needs=_OWN_COLUMNS, common=False)
    overlong: Literal["head_tail"] = key("head_tail", DATA, "not used", needs=_OWN_COLUMNS, common=False)
    max_seq_length: int = key(512, DATA, "tokens of a prompt and both answers together", allowed=Range(16))


@dataclass(frozen=True, kw_only=True)
class BaselinesRecipe:
    """A recipe of classical models: nothing but data, folds and what is tried."""

    method: Literal["baselines"] = key(REQUIRED, MODEL, "what predicts: baselines, or encoder in a recipe of its own")
    grids: dict[str, Any] | None = key(  # noqa: RUF009 - it makes a dataclass field
        None,
        MODEL,
        "values that are tried for each model, as MODEL: {PARAMETER: [VALUE, ...]}",
        default_text="those of isotune.projects.arena.baselines.estimators",
    )
    dataset_name: str = key(REQUIRED, DATA, _FOLDER, is_path=True)
    test_labels: str | None = key(None, DATA, _LABELS, is_path=True, changes_result=False)
    folds: int = key(5, SCHEDULE, "folds of the cross-validation, which never splits a prompt", allowed=Range(2))
    seed: int = key(42, SCHEDULE, "seed of folds and models", allowed=Range(0, 2**32 - 1))
    output_dir: str = key(REQUIRED, OUTPUT, "folder of the run", changes_result=False, is_path=True)
    given: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def keys(cls) -> dict[str, Key]:
        """Every key by its name."""
        return keys_of(cls)

    @classmethod
    def from_layers(cls, layers: Sequence[Layer]) -> Self:
        """The recipe that layers of values say together, the last one winning.

        Raises:
            UserError: what is wrong, and where.
        """
        values, given = settle(cls.keys(), layers, ())
        return cls(**values, given=given)

    def with_values(self, **changes: Any) -> Self:
        """This recipe with other values."""
        return self.from_layers([Layer(self.given), Layer(changes)])

    def resolved(self) -> dict[str, Any]:
        """Every value in effect, given or default, by its key."""
        return {name: getattr(self, name) for name in self.keys() if getattr(self, name) is not None}

    def fingerprint(self) -> str:
        """Digest of the keys that change the result."""
        keys = self.keys()
        what = {name: value for name, value in self.resolved().items() if keys[name].changes_result}
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()

    def write(self, path: Path) -> None:
        """Write the resolved recipe; `--config PATH` runs it again."""
        keys, resolved = self.keys(), self.resolved()
        write_file(path, {g: {name: v for name, v in resolved.items() if keys[name].group == g} for g in GROUPS})


def read_arena_recipe(argv: Sequence[str], *, default_config: Path, prog: str) -> ArenaRecipe | BaselinesRecipe:
    """The recipe that a command line says; its `method` decides of which kind it is.

    `--help` shows the keys of the kind of `--config`.

    Raises:
        UserError: anything in the file or the flags that is wrong, with its place and what to do.
    """
    config = default_config
    for place, word in enumerate(argv):
        if word == "--config" and place + 1 < len(argv):
            config = Path(argv[place + 1])
        elif word.startswith("--config="):
            config = Path(word.removeprefix("--config="))
    kind = BaselinesRecipe if read_file(config).given.get("method") == "baselines" else ArenaRecipe
    description = "Which of two answers people prefer: an encoder, or the baselines that it must beat."
    file, flags = read_flags(argv, kind.keys(), default_config=default_config, prog=prog, description=description)
    return kind.from_layers([flags] if file is None else [read_file(file), flags])
