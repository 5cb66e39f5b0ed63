"""What a run trains and evaluates on, read and prepared as its recipe says.

Apart from the trainer, whose libraries take seconds to import: a plan counts the same documents without them.
"""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from isotune.config import ClassificationRecipe, Recipe
from isotune.data.classification.split import prepare_both
from isotune.data.prepared import PreparedData
from isotune.data.sft.preparation import SftSettings, prepare


@dataclass(frozen=True)
class RunData:
    """The prepared training documents, and those of the evaluation where the recipe names any."""

    train: PreparedData
    evaluation: PreparedData | None

    def print_tables(self) -> None:
        """Print what preparation counted, a table a data set."""
        for prepared in filter(None, (self.train, self.evaluation)):
            print(prepared.table, flush=True)


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
        data.print_tables()
    return data


def _conversations(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, show: bool) -> RunData:
    settings = SftSettings.of(recipe)
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
