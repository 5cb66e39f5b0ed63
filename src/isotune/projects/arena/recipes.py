"""The recipes of the Chatbot Arena, an encoder or classical baselines, and what the library has to know of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from isotune.config.base_recipe import BaseRecipe
from isotune.config.command_line import CommandLine
from isotune.config.recipes import PROJECTS, ClassificationRecipe, ProjectKind, read_recipe
from isotune.config.schema import DATA, MODEL, OUTPUT, REQUIRED, SCHEDULE, SHARE, Range, Requirement, key
from isotune.config.task_types import EVAL_METRICS, SINGLE_LABEL
from isotune.data.documents import RunData

_FOLDER = "folder with the competition's train.csv, test.csv and sample_submission.csv"
_LABELS = "file that says who won in test.csv, to score the finished predictions once; the competition keeps it"
_NOT_PLANNED = "method: baselines trains no network, so there is no launch and no memory to plan"
_OWN_COLUMNS = Requirement(lambda values: False, "the Arena's files have their own columns, classes and split")


@dataclass(frozen=True, kw_only=True)
class ArenaRecipe(ClassificationRecipe):
    """A recipe of an encoder that reads a prompt and both answers, and says which one people prefer."""

    eval_metrics: ClassVar[tuple[str, ...]] = EVAL_METRICS[SINGLE_LABEL]

    method: Literal["encoder"] = key("encoder", MODEL, "what predicts: encoder, or baselines in a recipe of their own")
    dataset_name: str = key(REQUIRED, DATA, _FOLDER, is_path=True)
    dataset_mixture: list[dict[str, Any]] | None = key(None, DATA, "not used", needs=_OWN_COLUMNS, common=False)
    eval_dataset_mixture: list[dict[str, Any]] | None = key(None, DATA, "not used", needs=_OWN_COLUMNS, common=False)
    label_thresholds: list[float] | None = key(None, DATA, "not used", needs=_OWN_COLUMNS, common=False)
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
    dataset_text_pair_field: str | None = key(None, DATA, "not used", needs=_OWN_COLUMNS, common=False)
    dataset_label_field: str = key("label", DATA, "not used", needs=_OWN_COLUMNS, common=False)
    task_type: Literal["auto"] = key("auto", DATA, "not used", needs=_OWN_COLUMNS, unset="auto", common=False)
    dataset_id_field: str = key("auto", DATA, "not used", needs=_OWN_COLUMNS, common=False)
    label_names: tuple[str, ...] | None = key(None, DATA, "not used", needs=_OWN_COLUMNS, common=False)
    clean_text: bool = key(False, DATA, "not used", needs=_OWN_COLUMNS, common=False)
    augment_word_dropout: float = key(0.0, DATA, "not used", needs=_OWN_COLUMNS, unset=0.0, common=False)
    augment_word_swap: float = key(0.0, DATA, "not used", needs=_OWN_COLUMNS, unset=0.0, common=False)
    augment_synonyms: str | None = key(None, DATA, "not used", needs=_OWN_COLUMNS, common=False)
    augment_synonym_rate: float = key(0.1, DATA, "not used", needs=_OWN_COLUMNS, common=False)
    label_source: Literal["column"] = key("column", DATA, "not used", needs=_OWN_COLUMNS, common=False)
    drop_leaked: bool = key(False, DATA, "not used", needs=_OWN_COLUMNS, common=False)
    sentences: tuple[str, ...] | None = key(None, OUTPUT, "not used", needs=_OWN_COLUMNS, common=False)
    overlong: Literal["head_tail"] = key("head_tail", DATA, "not used", needs=_OWN_COLUMNS, common=False)
    max_seq_length: int = key(512, DATA, "tokens of a prompt and both answers together", allowed=Range(16))


@dataclass(frozen=True, kw_only=True)
class BaselinesRecipe(BaseRecipe):
    """A recipe of classical models: data, folds, and the values that are tried."""

    task: Literal["classification"] = key("classification", MODEL, "what is learned", changes_result=False)
    method: Literal["baselines"] = key(REQUIRED, MODEL, "what predicts: baselines, or encoder in a recipe of its own")
    grids: dict[str, Any] | None = key(
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


def read_arena_recipe(argv: Sequence[str], *, default_config: Path, prog: str) -> ArenaRecipe | BaselinesRecipe:
    """The recipe of a command line, of the kind that its `method` says, as `--help` is; UserError for any mistake."""
    method = CommandLine.parse(argv, default_config).given().get("method")
    return read_recipe(
        argv,
        default_config=default_config,
        prog=prog,
        description="Which of two answers people prefer: an encoder, or the baselines that it must beat.",
        kind=BaselinesRecipe if method == "baselines" else ArenaRecipe,
    )


def _prepare(recipe: ArenaRecipe, tokenizer: Any) -> RunData:
    from isotune.projects.arena.battles import read_competition
    from isotune.projects.arena.encoder import prepare_competition

    return prepare_competition(read_competition(Path(recipe.dataset_name)), recipe, tokenizer)[0]


PROJECTS.append(
    ProjectKind(ArenaRecipe, "method", _prepare, lambda given: _NOT_PLANNED if given["method"] == "baselines" else None)
)
