"""What a run trains and evaluates on, read and prepared as its recipe says.

Apart from the trainer, whose libraries take seconds to import: a plan counts the same documents without them.
"""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from isotune.config import ClassificationRecipe, Recipe
from isotune.data.classification.preparation import PreparedLabels
from isotune.data.classification.split import prepare_both
from isotune.data.sft.preparation import PreparationSettings, PreparedData, prepare


@dataclass(frozen=True)
class RunData:
    """The prepared training documents, and those of the evaluation where the recipe names any."""

    train: PreparedData | PreparedLabels
    evaluation: PreparedData | PreparedLabels | None


def prepare_run_data(
    recipe: Recipe | ClassificationRecipe, tokenizer: PreTrainedTokenizerBase, *, show: bool
) -> RunData:
    """Read and prepare what the recipe names: masked and packed conversations, or labelled texts.

    Args:
        show: progress on stderr and a table of each set on stdout; one process of a launch should say True.

    Raises:
        UserError: whatever the user can put right, in one sentence.
    """
    if isinstance(recipe, ClassificationRecipe):
        data = RunData(*prepare_both(recipe, tokenizer, show_progress=show))
    else:
        data = _conversations(recipe, tokenizer, show)
    if show:
        for prepared in filter(None, (data.train, data.evaluation)):
            print(prepared.table, flush=True)
    return data


def _conversations(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, show: bool) -> RunData:
    settings = PreparationSettings(
        max_seq_length=recipe.max_seq_length,
        packing=recipe.packing,
        overlong=recipe.overlong,  # type: ignore[arg-type]
        train_on=recipe.train_on,  # type: ignore[arg-type]
        dataset_text_field=recipe.dataset_text_field,
        seed=recipe.seed,
    )
    train = prepare(recipe.dataset_name, recipe.dataset_split, tokenizer, settings, show_progress=show)
    evaluation = None
    if recipe.eval_dataset_name:
        evaluation = prepare(
            recipe.eval_dataset_name,
            recipe.eval_dataset_split,
            tokenizer,
            settings,
            name="eval_dataset_name",
            show_progress=show,
        )
    return RunData(train, evaluation)
