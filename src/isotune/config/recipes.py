"""The recipes of the two tasks, supervised fine-tuning and classification, and which of them given values belong to.

A recipe names its task by the key `task`. A recipe of an earlier version does not, and is known by its keys.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import combinations, product
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, cast

from isotune.config.base_recipe import BaseRecipe
from isotune.config.command_line import CommandLine
from isotune.config.engine_keys import WITH_EVALUATION
from isotune.config.run_recipe import EVALUATION_ON, RunRecipe
from isotune.config.schema import (
    ANY_SHARE,
    DATA,
    MODEL,
    OUTPUT,
    POSITIVE,
    REQUIRED,
    SCHEDULE,
    SHARE,
    Contradiction,
    Range,
    Requirement,
    Values,
    key,
)
from isotune.config.task_types import ALL_EVAL_METRICS, TaskType, wrong_for_type

TrainOn = Literal["all", "last", "everything"]
Overlong = Literal["truncate", "split", "drop"]
OverlongText = Literal["head", "tail", "head_tail"]
LabelSource = Literal["column", "rules", "random"]

AUTO, NO_IDS = "auto", "none"  # what `dataset_id_field` says instead of a column

_NO_PAIR = Requirement(
    lambda values: values["dataset_prompt_field"] is None, "dataset_prompt_field and dataset_completion_field say it"
)
_LABEL_COLUMN = Requirement(lambda values: values["label_source"] == "column", "label_source is not column")
_SYNONYMS = Requirement(lambda values: values["augment_synonyms"] is not None, "it needs augment_synonyms")


def _wrong_names(names: Sequence[str]) -> str | None:
    """What is wrong with names of classes, where anything is."""
    folded = [" ".join(name.casefold().split()) for name in names]
    if len(names) < 2:
        return "classes are two or more: say them as a list: [neg, pos], or as flags --label_names neg pos"
    return "a name is empty or stands twice" if "" in folded or len({*folded}) < len(folded) else None


def _other_count(numbers: str, counted: str, values: Values) -> bool:
    """Whether a list of numbers, one for each class, has another length than `num_labels` or `label_names` says."""
    given, said = values[numbers], values[counted]
    if said is None or not isinstance(given, list):
        return False
    count, classes = len(cast(list[float], given)), said if isinstance(said, int) else len(said)
    return count != classes and not (numbers == "label_thresholds" and count == 1)


@dataclass(frozen=True, kw_only=True)
class Recipe(RunRecipe):
    """A recipe of packed instruction tuning: a step sees `global_batch_size` rows of `max_seq_length` tokens."""

    eval_metrics: ClassVar[tuple[str, ...]] = ("eval_loss", "eval_perplexity")

    # fmt: off
    task: Literal["sft"] = key(
        "sft", MODEL, "what the model learns: sft, supervised fine-tuning on conversations", changes_result=False)
    dataset_text_field: str = key("text", DATA, "column that holds the conversation", needs=_NO_PAIR)
    dataset_prompt_field: str | None = key(
        None, DATA, "column that holds the question, where the answer is in a column of its own",
        default_text="found by its name")
    dataset_completion_field: str | None = key(
        None, DATA, "column that holds that answer", default_text="found by its name")
    chat_format: Literal["auto", "guanaco", "template"] | str = key(
        "auto", DATA, "form of conversations: guanaco, template (the tokenizer's own), or a file that holds a Jinja "
        "template; auto: the tokenizer's where it has one", is_path=True)
    train_on: TrainOn = key(
        "all", DATA, "what to learn: all answers of a conversation, the last one, or everything, questions included")
    overlong: Overlong = key("truncate", DATA, "what happens to a conversation longer than max_seq_length")
    router_aux_loss_coef: float = key(
        0.0, SCHEDULE, "weight of the loss that balances the routers of a mixture of experts, over the whole global "
        "batch; it takes a second forward", allowed=Range(0), unset=0.0, common=False)
    packing: bool = key(True, DATA, "pack several conversations into a row; they never see each other")
    show_example: bool = key(
        True, OUTPUT, "show one example before the first step, what is learnt marked", changes_result=False)
    sample_prompt: str = key(
        "What makes a good friend?", OUTPUT, "prompt to answer at the end; empty for none", changes_result=False)
    # fmt: on

    contradictions: ClassVar[tuple[Contradiction, ...]] = (
        *RunRecipe.contradictions,
        Contradiction(
            ("dataset_prompt_field", "dataset_completion_field"),
            lambda values: (values["dataset_prompt_field"] is None) != (values["dataset_completion_field"] is None),
            "name both columns, the question's and the answer's",
        ),
    )


@dataclass(frozen=True, kw_only=True)
class ClassificationRecipe(RunRecipe):
    """A recipe of unpadded classification: a step sees `global_batch_size` documents."""

    eval_metrics: ClassVar[tuple[str, ...]] = ALL_EVAL_METRICS
    found_in_data: ClassVar[frozenset[str]] = frozenset(
        {"dataset_text_field", "dataset_text_pair_field", "dataset_label_field", "label_names", "task_type"}
    )

    # fmt: off
    task: Literal["classification"] = key(
        "classification", MODEL, "what the model learns: the class of a text", changes_result=False)
    task_type: TaskType = key(
        AUTO, MODEL, "kind of labels: single_label, one class a text; multi_label, any number of labels; regression, a "
        "number", needs=_LABEL_COLUMN, unset=AUTO, default_text="what the labels show")
    dataset_text_field: str = key("text", DATA, "column that holds the text")
    dataset_text_pair_field: str | None = key(
        None, DATA, "column that holds the second text of a pair; none: a row is one text", needs=_LABEL_COLUMN,
        unset=REQUIRED, default_text="found by its name")
    dataset_label_field: str = key(
        "label", DATA, "column that holds the class: a whole number from 0, a word, or true or false; by task_type a "
        "list of labels, or a number", needs=_LABEL_COLUMN)
    label_names: tuple[str, ...] | None = key(
        None, DATA, "names of the classes, in their order; of multi_label also columns of 0 and 1",
        needs=_LABEL_COLUMN, default_text="those of the data")
    dataset_id_field: str = key(
        AUTO, DATA, "column that names a row in predictions; none: the rows' numbers do", unset=AUTO, if_empty=NO_IDS,
        default_text="id where it names each row once, else row numbers")
    clean_text: bool = key(False, DATA, "undo HTML breaks and entities, and escapes such as a written-out \\n")
    label_source: LabelSource = key(
        "column", DATA, "where classes come from; rules: command, statement, question; random: a negative control")
    eval_split_share: float = key(
        0.0, DATA, "share of the training data that is kept for evaluation instead, chosen by content and seed",
        allowed=SHARE, needs=EVALUATION_ON, unset=0.0, default_text="none")
    drop_leaked: bool = key(
        False, DATA, "remove training texts that are duplicates or near duplicates of evaluation texts",
        needs=WITH_EVALUATION)
    augment_word_dropout: float = key(
        0.0, DATA, "share of the words of a training text that are left out, others in each epoch", allowed=ANY_SHARE,
        unset=0.0, default_text="none", common=False)
    augment_word_swap: float = key(
        0.0, DATA, "share of the words of a training text that change places with the next one, the same",
        allowed=ANY_SHARE, unset=0.0, default_text="none", common=False)
    augment_synonyms: str | None = key(
        None, DATA, "table of synonyms for words of training texts, .tsv or .json: a word and what may stand for it",
        default_text="none", is_path=True, common=False)
    augment_synonym_rate: float = key(
        0.1, DATA, "share of the words with synonyms that one of them takes the place of", allowed=ANY_SHARE,
        needs=_SYNONYMS, common=False)
    num_labels: int | None = key(
        None, DATA, "classes; data with another number is refused", allowed=Range(2), default_text="those of the data")
    overlong: OverlongText = key(
        "head", DATA,
        "what is kept of a text longer than max_seq_length; head_tail: a quarter from the start, the rest from the end")
    max_seq_length: int = key(
        512, DATA, "maximum length of a document, in tokens", allowed=Range(3),
        default_text="512, or the model's positions where they are fewer")
    global_batch_size: int = key(32, SCHEDULE, "documents in one step, on any hardware", allowed=Range(1))
    class_weights: list[float] | Literal["balanced"] | None = key(
        None, SCHEDULE, "weight of each class in the training loss, of multi_label of each label where a text has it; "
        "balanced: every class has the same total weight", allowed=POSITIVE, default_text="none: all alike")
    label_thresholds: list[float] | Literal["chosen"] | None = key(
        None, DATA, "of multi_label: from which probability a text has a label, one number or one for each label; "
        "chosen: those with the best F1 on a tenth of the training texts, which are not trained on",
        allowed=Range(0, 1, low_open=True, high_open=True), needs=_LABEL_COLUMN, default_text="0.5")
    label_smoothing_factor: float = key(
        0.0, SCHEDULE, "share of each target that is spread over all classes, in the training loss", allowed=SHARE)
    sentences: tuple[str, ...] | None = key(
        None, OUTPUT, "texts to classify at the end, shown with the true class where it is known", changes_result=False)
    # fmt: on

    contradictions: ClassVar[tuple[Contradiction, ...]] = (
        *RunRecipe.contradictions,
        *(
            Contradiction((numbers, counted), partial(_other_count, numbers, counted), "say one number for each class")
            for numbers, counted in product(("class_weights", "label_thresholds"), ("num_labels", "label_names"))
        ),
        Contradiction(
            ("label_names", "num_labels"),
            lambda values: (
                bool(values["label_names"]) and values["num_labels"] not in (None, len(values["label_names"]))
            ),
            "say one name for each class",
        ),
        Contradiction(
            ("label_names",),
            lambda values: bool(values["label_names"]) and _wrong_names(values["label_names"]),
        ),
        Contradiction(
            ("task_type",),
            lambda values: values["task_type"] != AUTO and wrong_for_type(values, values["task_type"]),
        ),
        *(
            Contradiction(
                keys,
                lambda values, keys=keys: values["label_source"] == "column" and values[keys[0]] == values[keys[1]],
                "a column is one thing alone: a text that holds its own label has nothing to learn",
            )
            for keys in combinations(("dataset_text_field", "dataset_text_pair_field", "dataset_label_field"), 2)
        ),
        *(
            Contradiction(
                (name, "dataset_text_pair_field"),
                lambda values, name=name: bool(values[name] and values["dataset_text_pair_field"]),
                "only texts that stand alone are augmented",
            )
            for name in ("augment_word_dropout", "augment_word_swap", "augment_synonyms")
        ),
        Contradiction(
            ("sentences", "dataset_text_pair_field"),
            lambda values: bool(values["sentences"] and values["dataset_text_pair_field"]),
            "a sentence is one text, and this model reads two",
        ),
    )


AnyRecipe = TypeVar("AnyRecipe", bound=BaseRecipe)


def read_recipe(
    argv: Sequence[str], *, default_config: Path | None, prog: str, description: str, kind: type[AnyRecipe] = Recipe
) -> AnyRecipe:
    """The recipe of a command line: a file (`--config`, else `default_config`) and a flag for every key.

    `--help` and `--help-all` print and end the program; `prog` and `description` stand in that help. UserError says
    what is wrong in the file or the flags, where, and what to do.
    """
    command, keys = CommandLine.parse(argv, default_config), kind.keys()
    command.answer_help(keys, default_config, prog, description)
    return kind.from_layers(command.layers(keys))


TASKS: dict[str, type[Recipe | ClassificationRecipe]] = {"sft": Recipe, "classification": ClassificationRecipe}


@dataclass(frozen=True)
class ProjectKind:
    """A kind of recipe that a project adds."""

    recipe: type[ClassificationRecipe]
    own_key: str  # that no other kind has; a recipe that has it is of this kind
    prepare: Callable[[Any, Any], Any]  # the run's data, given the recipe and its tokenizer
    why_not_planned: Callable[[Mapping[str, Any]], str | None]  # the sentence that refuses to plan given values


PROJECTS: list[ProjectKind] = []  # each project appends its own when `isotune.projects` is imported


def project_of(keys: Mapping[str, Any]) -> ProjectKind | None:
    """The project whose own key is among `keys`."""
    import_module("isotune.projects")
    return next((kind for kind in PROJECTS if kind.own_key in keys), None)


def task_of(given: Mapping[str, Any]) -> str | None:
    """The task that given values name, or whose own keys are among them; None where they leave it open."""
    if "task" in given:
        return given["task"]
    sft, classification = Recipe.keys().keys(), ClassificationRecipe.keys().keys()
    own = {"sft": sft - classification, "classification": classification - sft}
    named = [task for task, names in own.items() if names & given.keys()]
    return named[0] if len(named) == 1 else None


def kind_of(values: Mapping[str, Any]) -> type[Recipe | ClassificationRecipe]:
    """The class of the recipe that resolved values belong to."""
    if task_of(values) == "sft":
        return Recipe
    project = project_of(values)
    return project.recipe if project else ClassificationRecipe
