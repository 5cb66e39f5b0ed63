"""The training and evaluation documents of a recipe, split by content and checked for duplicates before training.

docs/classification.md defines exact and near duplicates. Candidates of the latter are found by MinHash (Broder 1997;
Leskovec, Rajaraman and Ullman, chapter 3), and the similarity of each is then computed exactly.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from importlib import import_module
from itertools import islice
from typing import Any

import numpy as np
from tqdm import tqdm

from isotune.config import ClassificationRecipe
from isotune.config.recipes import AUTO
from isotune.config.task_types import MULTI_LABEL, REGRESSION, SINGLE_LABEL, wrong_for_type
from isotune.data.cache import load_or_build
from isotune.data.class_index import listed
from isotune.data.classification.augmentation import Augmentation, augmented
from isotune.data.classification.columns import find_columns, said
from isotune.data.classification.labels import ClassificationSettings
from isotune.data.classification.preparation import LabelledSplit, tokenize
from isotune.data.classification.thresholds import CHOSEN, CHOSEN_ON, CHOSEN_SHARE
from isotune.data.contents import EMPTY, HELD_OUT, hash_uniform, held_out, normalised
from isotune.data.documents import PreparedData, RunData, check_left_out, digest
from isotune.data.mixture import evaluation_source, training_source
from isotune.data.sources.source import Source
from isotune.io.errors import UserError

DUPLICATES_FORMAT_VERSION = 1  # raised when the same texts are compared otherwise

NEAR_JACCARD = 0.8
RUN_WORDS = 3
BANDS, BAND_ROWS = 24, 5
SEED = 42
TEXTS_AT_ONCE = 1_000

EXACTLY, NEARLY = 1, 2
HOW = {"exactly": EXACTLY, "nearly": NEARLY}

_WORD = re.compile(r"\w+")


def prepare_labelled(recipe: ClassificationRecipe, tokenizer: Any, *, show: bool) -> RunData:
    """Read the labelled texts to train on and, where the recipe names or keeps any, those to evaluate on.

    `show` asks for progress on stderr and a table of each set on stdout; one process of a launch should.
    """
    augmentation = Augmentation.of(recipe)  # a table that cannot be read is said before the work
    source = training_source(recipe)
    found: dict[str, Any] = dict(find_columns(source, recipe))
    guess = (said(found),) if found else ()
    recipe = recipe.with_values(**found)
    train = _read(source, recipe, tokenizer, show)
    train = replace(train, notes=(*train.notes, *guess))
    _check_task_type(recipe, train, found)
    train.check_classes(evaluation=False)
    classes = train.num_labels
    if recipe.label_source == "column" and recipe.label_names is None and train.class_names:
        found["label_names"] = list(train.class_names)
    remarks: dict[str, Any] = {}
    if recipe.eval_dataset_name is not None:
        evaluation = _read(evaluation_source(recipe), recipe, tokenizer, show, train)
        if train.class_names is None and not evaluation.numbered:
            raise UserError(
                f"the classes of {train.source.name} are the numbers 0 to {classes - 1}, and {evaluation.source.name} "
                f"has {listed(evaluation.class_names or ())}: label_names says which is which"
            )
        if recipe.label_names is None and not train.numbered and evaluation.by_place:
            raise UserError(
                f"the classes of {train.source.name} are words in the order of the alphabet ("
                f"{listed(train.class_names or ())}), and {evaluation.source.name} has numbers, or true and false: "
                "label_names says which is which"
            )
        if train.task_type != REGRESSION:
            evaluation = replace(evaluation, settings=replace(evaluation.settings, num_labels=classes))
        evaluation.check_classes(evaluation=True)
    elif recipe.eval_split_share:
        train, evaluation = split_by_content(train, recipe.eval_split_share, recipe.seed)
        remarks = {"held_out": len(evaluation.documents)}
    else:
        train, to_choose_on = _hold_out_to_choose(train, recipe)
        to_train = augmented(train.prepared(), train.contents, augmentation, recipe, tokenizer, show_progress=show)
        return RunData(to_train, None, found, to_choose_on).shown(show)
    pair = digest("overlap", DUPLICATES_FORMAT_VERSION, train.fingerprint, evaluation.fingerprint)
    in_the_other, _ = load_or_build(pair, lambda _: (find_overlap(train, evaluation, show_progress=show), {}))
    if recipe.drop_leaked and in_the_other["train"].any():
        kept = in_the_other["train"] == 0
        train = train.select(kept, "drop_leaked", evaluation.fingerprint)
        remarks |= {"dropped": int((~kept).sum())}
        if not len(train.documents):
            raise UserError(
                f"drop_leaked: all of {train.source.name} stands in {evaluation.source.name} too: nothing is left to "
                "train on"
            )
        leaked = {"in the evaluation data too": int((~kept).sum())}
        check_left_out(train.source.name, len(kept), leaked, allowed=recipe.allow_dropped, show=show)
    if "held_out" in remarks or "dropped" in remarks:
        train.check_classes(evaluation=False, left_by="drop_leaked" if "dropped" in remarks else "eval_split_share")
    rows = train.documents.source_rows
    train, to_choose_on = _hold_out_to_choose(train, recipe)
    if "dropped" not in remarks:  # of the documents that are left to train on
        left = in_the_other["train"][np.isin(rows, train.documents.source_rows)]
        remarks |= {"in_the_other": _counted(left)}
    to_evaluate = evaluation.prepared(classes, in_the_other=_counted(in_the_other["evaluation"]))
    prepared = train.prepared(classes, **remarks)
    to_train = augmented(prepared, train.contents, augmentation, recipe, tokenizer, show_progress=show)
    return RunData(to_train, to_evaluate, found, to_choose_on).shown(show)


def _hold_out_to_choose(
    train: LabelledSplit, recipe: ClassificationRecipe
) -> tuple[LabelledSplit, PreparedData | None]:
    """The training texts, and where label thresholds are chosen those that are kept back for it."""
    if recipe.label_thresholds != CHOSEN:
        return train, None
    train, kept = split_by_content(train, CHOSEN_SHARE, recipe.seed, purpose=CHOSEN_ON)
    train.check_classes(evaluation=False, left_by="label_thresholds")
    note = f"label_thresholds: {len(kept.documents):,} more texts are kept back to choose them on"
    return replace(train, notes=(*train.notes, note)), kept.prepared()


def split_by_content(
    whole: LabelledSplit, share: float, seed: int, purpose: str = HELD_OUT
) -> tuple[LabelledSplit, LabelledSplit]:
    """Split a data set at random into training and evaluation documents.

    Only the content of a text and the seed decide its side: documents with the same text are on one side, and a row
    that is moved, added or removed changes the side of no other row; but where rules give the classes, a class that
    has two texts has one on each side. The sides of one `purpose` say nothing about those of another. UserError if one
    of the sides would be empty.
    """
    kept_back = held_out(share, seed, whole.contents, purpose)
    if whole.settings.label_source == "rules":
        kept_back = _with_every_class(kept_back, whole.documents.labels, whole.contents, seed)
    key, use, other = "eval_split_share", "evaluate on", "choose another share or seed"
    if purpose == CHOSEN_ON:
        key, use, other = "label_thresholds: chosen", "choose them on", "say the thresholds, or choose another seed"
    if kept_back.all() or not kept_back.any():
        raise UserError(
            f"{key}: {share:g} of the {len(kept_back)} rows of {whole.source.name} leaves "
            f"{'none to train on' if kept_back.all() else f'none to {use}'}: {other}"
        )
    sides = ("train", "held out") if purpose == HELD_OUT else (f"without {purpose}", purpose)
    return whole.select(~kept_back, sides[0], share, seed), whole.select(kept_back, sides[1], share, seed)


def _with_every_class(kept_back: np.ndarray, labels: np.ndarray, contents: np.ndarray, seed: int) -> np.ndarray:
    """The same sides, but for one text of each class that would be on one side alone: the nearest to the other one."""
    sides, nearness = kept_back.copy(), hash_uniform(HELD_OUT, seed, contents)
    for label in np.unique(labels):
        own = labels == label
        if len(np.unique(contents[own])) > 1 and (sides[own].all() or not sides[own].any()):
            is_kept = bool(sides[own][0])
            nearest = contents[own][(nearness[own].argmax if is_kept else nearness[own].argmin)()]
            sides[own & (contents == nearest)] = not is_kept
    return sides


def _read(
    source: Source,
    recipe: ClassificationRecipe,
    tokenizer: Any,
    show_progress: bool,
    train: LabelledSplit | None = None,
) -> LabelledSplit:
    """One of the recipe's data sets, with the kind of labels and the names that `train` has, where it is given."""
    settings = ClassificationSettings.of(recipe)
    if train is not None and settings.label_source == "column":
        task_type: Any = train.task_type
        settings = replace(settings, task_type=task_type, label_names=train.class_names or settings.label_names)
        if train.task_type == MULTI_LABEL or (train.task_type == SINGLE_LABEL and train.class_names is None):
            settings = replace(settings, num_labels=train.num_labels)
    return tokenize(source, tokenizer, settings, show_progress=show_progress)


def _check_task_type(recipe: ClassificationRecipe, train: LabelledSplit, found: dict[str, Any]) -> None:
    """Record the kind of labels that the data show where nobody says it; UserError where the recipe needs another.

    The kind is left open for classes, so that the recipe of such a run is the same as it always was.
    """
    if recipe.task_type != AUTO:
        return
    if train.task_type != SINGLE_LABEL:
        found["task_type"] = train.task_type
    if wrong := wrong_for_type(recipe.values, train.task_type):
        raise UserError(f"{train.source.name} is labelled for task_type {train.task_type}: {wrong}")


def _counted(documents: np.ndarray) -> dict[str, int]:
    """The documents of one set that are in the other, by how."""
    return {name: int((documents == how).sum()) for name, how in HOW.items()}


def find_overlap(train: LabelledSplit, evaluation: LabelledSplit, *, show_progress: bool) -> dict[str, np.ndarray]:
    """Whether each document is in the other set: 0 for no, EXACTLY or NEARLY; uint8 [documents] of either set by name.

    The texts of `evaluation` are held in memory, those of `train` in batches.
    """
    in_evaluation = _exactly_in(train.contents, evaluation.contents)
    in_train = _exactly_in(evaluation.contents, train.contents)
    rensa: Any = import_module("rensa")  # has no types, and is imported only where two sets are compared
    index = rensa.RMinHashLSH(threshold=NEAR_JACCARD, num_perm=BANDS * BAND_ROWS, num_bands=BANDS)
    others = list(evaluation.texts())
    for number, (runs, sketch) in enumerate(_sketched(others)):
        if runs:
            index.insert(number, sketch)
    texts = tqdm(
        _sketched(train.texts()), "comparing", len(train.documents), unit=" documents", disable=not show_progress
    )
    for number, (runs, sketch) in enumerate(texts):
        candidates: list[int] = index.query(sketch) if runs else []
        near = [other for other in candidates if jaccard(runs, runs_of_words(others[other])) >= NEAR_JACCARD]
        if near:
            in_evaluation[number] = in_evaluation[number] or NEARLY
        for other in near:
            in_train[other] = in_train[other] or NEARLY
    return {"train": in_evaluation, "evaluation": in_train}


def runs_of_words(text: str) -> frozenset[str]:
    """The runs of RUN_WORDS words in a text; a shorter text is one run, and one without words has none."""
    words = _WORD.findall(normalised(text))
    if len(words) < RUN_WORDS:
        return frozenset([" ".join(words)] if words else [])
    return frozenset(map(" ".join, zip(*(words[n:] for n in range(RUN_WORDS)), strict=False)))


def jaccard(left: frozenset[str], right: frozenset[str]) -> float:
    """The Jaccard similarity of two sets: the size of their intersection over that of their union."""
    shared = len(left & right)
    return shared / (len(left) + len(right) - shared)


def _sketched(texts: Iterable[str]) -> Iterator[tuple[frozenset[str], Any]]:
    """The runs of words of each text, with their MinHash."""
    rensa: Any = import_module("rensa")
    remaining = iter(texts)
    while runs := [runs_of_words(text) for text in islice(remaining, TEXTS_AT_ONCE)]:
        sketches = rensa.RMinHash.from_token_sets([list(own) for own in runs], num_perm=BANDS * BAND_ROWS, seed=SEED)
        yield from zip(runs, sketches, strict=True)


def _exactly_in(contents: np.ndarray, others: np.ndarray) -> np.ndarray:
    shared = np.isin(contents, others) & (contents != EMPTY)
    return np.where(shared, EXACTLY, 0).astype(np.uint8)
