"""The kinds of runs: instruction tuning and classification, each with its own keys, and how a command line is read."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, TypeVar

from isotune.config.command_line import read_flags
from isotune.config.engine_keys import WITH_EVALUATION
from isotune.config.recipe_file import read_file
from isotune.config.run_recipe import EVALUATION_ON, RunRecipe
from isotune.config.schema import (
    AT_LEAST_ONE,
    DATA,
    OUTPUT,
    POSITIVE,
    SCHEDULE,
    SHARE,
    Contradiction,
    Need,
    Range,
    key,
)

_LABEL_COLUMN = Need(lambda values: values["label_source"] == "column", "label_source is not column")


@dataclass(frozen=True, kw_only=True)
class Recipe(RunRecipe):
    """A recipe of packed instruction tuning: a step sees `global_batch_size` rows of `max_seq_length` tokens."""

    eval_metrics: ClassVar[tuple[str, ...]] = ("eval_loss", "eval_perplexity")

    dataset_text_field: str = key("text", DATA, "column that holds the conversation")
    train_on: Literal["all", "last"] = key("all", DATA, "answers to learn from: all of a conversation, or the last")
    overlong: Literal["truncate", "split", "drop"] = key(
        "truncate", DATA, "what happens to a conversation longer than max_seq_length"
    )
    packing: bool = key(True, DATA, "pack several conversations into a row; they never see each other")
    sample_prompt: str = key(
        "What makes a good friend?", OUTPUT, "question to answer at the end; empty asks none", changes_result=False
    )


@dataclass(frozen=True, kw_only=True)
class ClassificationRecipe(RunRecipe):
    """A recipe of unpadded classification: a step sees `global_batch_size` documents."""

    eval_metrics: ClassVar[tuple[str, ...]] = ("eval_loss", "eval_accuracy", "eval_f1_macro")

    dataset_text_field: str = key("text", DATA, "column that holds the text")
    dataset_label_field: str = key(
        "label", DATA, "column that holds the class, a whole number from 0", needs=_LABEL_COLUMN
    )
    dataset_id_field: str | None = key(
        None, DATA, "column that names a row in predictions", default_text="id where there is one, else row numbers"
    )
    clean_text: bool = key(False, DATA, "undo HTML breaks and entities, and escapes such as a written-out \\n")
    label_source: Literal["column", "rules", "random"] = key(
        "column", DATA, "where classes come from; rules: command, statement, question; random: a coin, as a control"
    )
    eval_split_share: float = key(
        0.0,
        DATA,
        "share of the training data that is kept for evaluation instead, chosen by content and seed",
        allowed=SHARE,
        needs=EVALUATION_ON,
        unset=0.0,
        default_text="none",
    )
    drop_leaked: bool = key(
        False,
        DATA,
        "leave out of training what the evaluation data holds too, exactly or nearly",
        needs=WITH_EVALUATION,
    )
    num_labels: int | None = key(
        None, DATA, "classes; data with another number is refused", allowed=Range(2), default_text="those of the data"
    )
    overlong: Literal["head", "tail", "head_tail"] = key(
        "head", DATA, "what is kept of a text longer than max_seq_length; head_tail: a quarter, and the end"
    )
    max_seq_length: int = key(512, DATA, "longest document, in tokens", allowed=Range(3))
    global_batch_size: int = key(32, SCHEDULE, "documents in one step, on any hardware", allowed=AT_LEAST_ONE)
    class_weights: list[float] | Literal["balanced"] | None = key(  # noqa: RUF009 - it makes a dataclass field
        None,
        SCHEDULE,
        "weight of each class in the training loss; balanced: every class weighs the same in all",
        allowed=POSITIVE,
        default_text="none: all alike",
    )
    label_smoothing_factor: float = key(
        0.0, SCHEDULE, "share of each target that is spread over all classes, in the training loss", allowed=SHARE
    )
    sentences: tuple[str, ...] | None = key(
        None, OUTPUT, "texts to classify at the end, with what was true where it is known", changes_result=False
    )

    contradictions: ClassVar[tuple[Contradiction, ...]] = (
        *RunRecipe.contradictions,
        Contradiction(
            ("class_weights", "num_labels"),
            lambda values: (
                isinstance(values["class_weights"], list)
                and values["num_labels"] not in (None, len(values["class_weights"]))
            ),
            "say one number for each class",
        ),
    )


AnyRecipe = TypeVar("AnyRecipe", bound=RunRecipe)


def read_recipe(
    argv: Sequence[str],
    *,
    default_config: Path | None,
    prog: str,
    description: str,
    kind: type[AnyRecipe] = Recipe,
) -> AnyRecipe:
    """The recipe that a command line says: a file (`--config`, else `default_config`) and a flag for every key.

    `--help` and `--help-all` print and end the program.

    Raises:
        UserError: anything in the file or the flags that is wrong, with its place and what to do.
    """
    file, flags = read_flags(argv, kind.keys(), default_config=default_config, prog=prog, description=description)
    return kind.from_layers([flags] if file is None else [read_file(file), flags])
