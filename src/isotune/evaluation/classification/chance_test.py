"""A test of an accuracy against chance, and the alarm of a negative control (docs/classification.md).

With `label_source: random` the accuracy is a binomial share of 1/2 for any model without a leak. The alarm is false in
at most 5% of runs: each text counts once, because its rows share their label, and the evaluation of the last step is
tested. The best of several would be selected by the labels that it is tested on.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from isotune.config import ClassificationRecipe
from isotune.data.documents import PreparedData
from isotune.evaluation.results import CLASSIFICATION, PREDICTIONS, read_predictions, write_result
from isotune.evaluation.statistics.resampling import LEVEL, Scores
from isotune.io.errors import RunFault, UserError

RESULT = "chance"  # RUN/eval/chance


@dataclass(frozen=True)
class ChanceTest:
    """An accuracy beside the one of chance, with its exact 95% interval; a text of several rows counts once."""

    right: int
    texts: int
    chance: float
    interval: tuple[float, float]
    p_value: float

    @property
    def accuracy(self) -> float:
        """The share of texts with a correct prediction."""
        return self.right / self.texts

    @property
    def differs(self) -> bool:
        """Whether `chance` lies outside the interval."""
        return not self.interval[0] <= self.chance <= self.interval[1]

    def __str__(self) -> str:
        low, high = self.interval
        side = "" if not self.differs else f", {'better' if self.accuracy > self.chance else 'worse'}"
        return (
            f"accuracy {self.accuracy:.3f} ({self.right} of {self.texts} texts), 95% interval {low:.3f} to {high:.3f}: "
            f"{'' if self.differs else 'not '}different from chance ({self.chance:.3f}){side}"
        )


def accuracy_against_chance(correct: np.ndarray, contents: np.ndarray, chance: float) -> ChanceTest:
    """The exact two-sided binomial test of an accuracy against that of chance, from 0 to 1.

    `correct` is bool [rows]; `contents` [rows] is equal where rows have the same text, which counts by its first row.
    """
    from scipy.stats import binomtest

    _, first = np.unique(contents, return_index=True)
    right, texts = int(np.asarray(correct)[first].sum()), len(first)
    test = binomtest(right, texts, chance)
    interval = test.proportion_ci(LEVEL, method="exact")
    return ChanceTest(right, texts, chance, (float(interval.low), float(interval.high)), float(test.pvalue))


def write_chance_test(run: Path, recipe: ClassificationRecipe, evaluation: PreparedData) -> ChanceTest:
    """Test the last evaluation of a finished run against chance, and write RUN/eval/chance.

    RunFault where labels are random and the accuracy differs from chance; the result is written then too.
    """
    folders = sorted(run.glob(f"eval/step-*/{PREDICTIONS}"))
    if not folders:
        raise UserError(f"{run} has no evaluation to test: eval_strategy is no, or it was removed")
    predictions = read_predictions(folders[-1])
    documents: Any = evaluation.documents
    if [row["id"] for row in predictions] != documents.ids.tolist():
        raise UserError(f"{folders[-1]} has other rows than the evaluation data, or in another order")
    labels, predicted = (np.array([row[key] for row in predictions]) for key in ("label", "prediction"))
    is_control = recipe.label_source == "random"
    chance = 0.5 if is_control else float(np.bincount(labels).max() / len(labels))
    test = accuracy_against_chance(predicted == labels, documents.columns["contents"], chance)
    alarm = is_control and test.differs
    facts = {
        "kind": CLASSIFICATION,
        "model": str(run),
        "dataset_name": recipe.eval_dataset_name or recipe.dataset_name,
        "dataset_split": recipe.eval_dataset_split if recipe.eval_dataset_name else recipe.dataset_split,
        "judged": folders[-1].parent.name,
        "label_source": recipe.label_source,
        "label_names": evaluation.class_names,
        "verdict": str(test),
        "alarm": "the pipeline leaks" if alarm else None,
    }
    metrics = {key: getattr(test, key) for key in ("accuracy", "chance", "p_value", "right", "texts")}
    scores = Scores(metrics, {"accuracy": test.interval})
    write_result(run / "eval" / RESULT, facts, scores, predictions, evaluation.texts())
    if alarm:
        raise RunFault(
            f"the negative control raises the alarm: labels are random, and yet {test}; the pipeline leaks, so look "
            f"for evaluation texts in training and for labels made from texts ({run / 'eval' / RESULT})"
        )
    return test
