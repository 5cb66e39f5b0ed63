"""The training and evaluation documents of a recipe, split by content and checked for duplicates before training.

Evaluation texts should not be among the training texts. Both sets are compared text by text (`duplicates`), the table
says how many documents stand in both, and `drop_leaked` leaves them out of training; nothing is ever left out of the
evaluation data, so that metrics stay comparable.
"""

from dataclasses import replace
from typing import Any

from isotune.config import ClassificationRecipe
from isotune.data.classification.duplicates import Overlap, compare
from isotune.data.classification.labels import ClassificationSettings
from isotune.data.classification.preparation import LabelledSplit, tokenize
from isotune.data.hash_split import held_out
from isotune.data.prepared import PreparedData
from isotune.data.sources.source import read_rows
from isotune.io.errors import UserError


def prepare_both(
    recipe: ClassificationRecipe, tokenizer: Any, *, show_progress: bool = True
) -> tuple[PreparedData, PreparedData | None]:
    """The documents to train on and, where the recipe names or keeps any, those to evaluate on.

    Args:
        tokenizer: of transformers, with a Rust backend, that puts a token before a text.
        show_progress: a bar on stderr; one process of a launch should say True.

    Raises:
        UserError: whatever the user can put right, in one sentence.
    """
    train = _read(recipe, tokenizer, "dataset_name", show_progress=show_progress)
    train.check_classes(evaluation=False)
    classes = train.num_labels
    evaluation: LabelledSplit | None = None
    remarks: dict[str, Any] = {}
    if recipe.eval_dataset_name is not None:
        evaluation = _read(recipe, tokenizer, "eval_dataset_name", show_progress=show_progress)
        evaluation = replace(evaluation, settings=replace(evaluation.settings, num_labels=classes))
        evaluation.check_classes(evaluation=True)
    elif recipe.eval_split_share:
        train, evaluation = split_by_content(train, recipe.eval_split_share, recipe.seed)
        remarks = {"held_out": len(evaluation.documents)}
    if evaluation is None:
        return train.prepared(), None
    overlap = compare(train, evaluation, show_progress=show_progress)
    if recipe.drop_leaked and overlap.train.any():
        kept = overlap.train == 0
        train = train.select(kept, "drop_leaked", evaluation.fingerprint)
        remarks |= {"dropped": int((~kept).sum())}
        if not len(train.documents):
            raise UserError(
                f"drop_leaked: all of {train.source.name} stands in {evaluation.source.name} too: nothing is left to "
                "train on"
            )
    else:
        remarks |= {"in_the_other": Overlap.counted(overlap.train)}
    if "held_out" in remarks or "dropped" in remarks:
        train.check_classes(evaluation=False, left_by="drop_leaked" if "dropped" in remarks else "eval_split_share")
    return (
        train.prepared(classes, **remarks),
        evaluation.prepared(classes, in_the_other=Overlap.counted(overlap.evaluation)),
    )


def split_by_content(whole: LabelledSplit, share: float, seed: int) -> tuple[LabelledSplit, LabelledSplit]:
    """Split a data set at random into training and evaluation documents.

    Only the content of a text and the seed decide its side: documents with the same text are on one side, and a row
    that is moved, added or removed changes the side of no other row.

    Raises:
        UserError: one of the sides would be empty.
    """
    kept_back = held_out(share, seed, whole.contents)
    if kept_back.all() or not kept_back.any():
        raise UserError(
            f"eval_split_share: {share:g} of the {len(kept_back)} rows of {whole.source.name} leaves "
            f"{'none to train on' if kept_back.all() else 'none to evaluate on'}: choose another share or seed"
        )
    return whole.select(~kept_back, "train", share, seed), whole.select(kept_back, "held out", share, seed)


def _read(recipe: ClassificationRecipe, tokenizer: Any, key: str, *, show_progress: bool) -> LabelledSplit:
    split = recipe.dataset_split if key == "dataset_name" else recipe.eval_dataset_split
    source = read_rows(getattr(recipe, key), split, name=key)
    return tokenize(source, tokenizer, ClassificationSettings.of(recipe), show_progress=show_progress)
