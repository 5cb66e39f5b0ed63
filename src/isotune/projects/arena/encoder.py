"""Predictions of a finished Arena encoder: the mean over both orders of the answers of a battle."""

from pathlib import Path

import numpy as np
import torch

from isotune.data.tokenizer import TextEncoder
from isotune.evaluation.classification.predict import check_finite, classify, probabilities_of
from isotune.evaluation.distributed_eval import Ranks
from isotune.evaluation.models import Classifier, load_run_classifier
from isotune.projects.arena.battles import Battles, Competition
from isotune.projects.arena.documents import in_both_orders
from isotune.projects.arena.preference import read_answers, score_preferences, write_preferences
from isotune.projects.arena.recipes import ArenaRecipe
from isotune.projects.arena.submission import write_submission

ENCODER, SUBMISSION = "encoder", "submission.csv"


def predict_battles(classifier: Classifier, battles: Battles, max_seq_length: int) -> np.ndarray:
    """Probabilities of a, b and tie, averaged over both orders: float64 [rows, 3].

    Exchanging the answers of every row exchanges the first two probabilities of every row, bit for bit.

    Raises:
        UserError: a logit is not finite.
    """
    both = in_both_orders(battles.battles, TextEncoder(classifier.tokenizer), max_seq_length)
    device = next(classifier.model.parameters()).device
    logits = classify(classifier, both.documents, Ranks(0, 1, device), progress=True)
    check_finite(logits, both.documents.ids.tolist(), classifier.name)
    return both.swap_average(probabilities_of(logits))


def evaluate_encoder(
    run: Path, recipe: ArenaRecipe, files: Competition, held_out: Battles, device: torch.device
) -> None:
    """Write RUN/submission.csv with the model that a run saved, and RUN/eval/arena for the `held_out` rows.

    The test rows are scored, in RUN/eval/arena_test, where the recipe has a file of their labels.

    Raises:
        UserError: the file of test labels is broken, or not of these rows.
    """
    classifier = load_run_classifier(run, device, torch.float32)
    test_probabilities = predict_battles(classifier, files.test, recipe.max_seq_length)
    write_submission(run / SUBMISSION, [battle.id for battle in files.test.battles], test_probabilities, files.sample)
    print(f"submission  {run / SUBMISSION}: {len(files.test):,} rows")
    parts = [("arena", "train, kept for evaluation", held_out)] if len(held_out) else []
    if recipe.test_labels:
        parts.append(("arena_test", "test", read_answers(Path(recipe.test_labels), files.test)))
    for folder, split, battles in parts:
        is_test = split == "test"
        probabilities = test_probabilities if is_test else predict_battles(classifier, battles, recipe.max_seq_length)
        predictions = {ENCODER: probabilities}
        scores = score_preferences(battles, predictions, main=ENCODER)
        write_preferences(run / "eval" / folder, battles, predictions, scores, model=str(run), split=split)
        print(f"{battles.name} ({split}): {len(battles):,} rows\n{scores.table()}")
