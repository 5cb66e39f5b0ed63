"""Whether an accuracy is more than chance gives, and the alarm of a negative control.

With `label_source: random` every text's class is a coin of the seed and of what the text says. Nothing that a model
learned from other texts tells the coin of this one, so its accuracy is a binomial share of 1/2, whatever it predicts:
an accuracy that differs from 1/2 says that the pipeline leaks. Rows of the evaluation stand in training, labels are
made from texts, or predictions saw their labels. The alarm is false in at most 5% of runs (the interval is Clopper and
Pearson's, exact), which holds only where

- each text counts once, however often it stands in the evaluation data: its rows share their coin;
- the evaluation is one that was fixed beforehand. That of the last step is; the best of several is not, because it was
  chosen by the very coins that it is judged on.

With any other labels the yardstick is the share of the commonest class: what is right without looking at a text.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from isotune.config import ClassificationRecipe
from isotune.data.prepared import PreparedData
from isotune.evaluation.results import CLASSIFICATION, PREDICTIONS, rows_digest, write_result
from isotune.io.errors import RunFault, UserError

CONFIDENCE = 0.95
RESULT = "chance"  # RUN/eval/chance
SAME, DIFFERS = "not different from chance", "different from chance"


@dataclass(frozen=True)
class Verdict:
    """How many of how many texts were right, beside the share that chance gives.

    Attributes:
        right, texts: counts; a text that stands in several rows counts once.
        chance: the share that is right by chance.
        interval: the exact 95% interval of the accuracy.
        p_value: of the exact two-sided binomial test against `chance`.
    """

    right: int
    texts: int
    chance: float
    interval: tuple[float, float]
    p_value: float

    @property
    def accuracy(self) -> float:
        """The share of texts that were right."""
        return self.right / self.texts

    @property
    def differs(self) -> bool:
        """Whether chance lies outside the interval."""
        return not self.interval[0] <= self.chance <= self.interval[1]

    def __str__(self) -> str:
        low, high = self.interval
        side = "" if not self.differs else f", {'better' if self.accuracy > self.chance else 'worse'}"
        return (
            f"accuracy {self.accuracy:.3f} ({self.right} of {self.texts} texts), 95% interval {low:.3f} to {high:.3f}: "
            f"{DIFFERS if self.differs else SAME} ({self.chance:.3f}){side}"
        )


def judge(right: np.ndarray, contents: np.ndarray, chance: float) -> Verdict:
    """The verdict on predictions.

    Args:
        right: bool [rows].
        contents: [rows]; equal where two rows hold one text, which then counts by its first row.
        chance: the share of rows that chance gets right.
    """
    from scipy.stats import binomtest

    _, first = np.unique(contents, return_index=True)
    counted = np.asarray(right)[first]
    found = binomtest(int(counted.sum()), len(counted), chance)
    interval = found.proportion_ci(CONFIDENCE, method="exact")
    return Verdict(
        int(counted.sum()), len(counted), chance, (float(interval.low), float(interval.high)), float(found.pvalue)
    )


def judge_run(run: Path, recipe: ClassificationRecipe, evaluation: PreparedData) -> Verdict:
    """Judge the last evaluation of a finished run and write the verdict to RUN/eval/chance.

    Returns:
        the verdict, for the caller to print.

    Raises:
        RunFault: labels are random and the accuracy differs from chance; the result is written then, too.
        UserError: the run has no evaluation.
    """
    folders = sorted(run.glob(f"eval/step-*/{PREDICTIONS}"))
    if not folders:
        raise UserError(f"{run} holds no evaluation to judge: eval_strategy is no, or it was removed")
    predictions: list[dict[str, Any]] = [json.loads(line) for line in folders[-1].read_text("utf-8").splitlines()]
    documents: Any = evaluation.documents
    assert [one["id"] for one in predictions] == documents.ids.tolist(), "predictions are in the order of the documents"
    labels = np.array([one["label"] for one in predictions])
    right = np.array([one["prediction"] for one in predictions]) == labels
    is_control = recipe.label_source == "random"
    chance = 0.5 if is_control else float(np.bincount(labels).max() / len(labels))
    verdict = judge(right, documents.contents, chance)
    alarm = is_control and verdict.differs
    write_result(
        run / "eval" / RESULT,
        {
            "kind": CLASSIFICATION,
            "model": str(run),
            "dataset_name": recipe.eval_dataset_name or recipe.dataset_name,
            "dataset_split": recipe.eval_dataset_split if recipe.eval_dataset_name else recipe.dataset_split,
            "rows": len(predictions),
            "rows_sha256": rows_digest(zip(documents.ids.tolist(), evaluation.texts(), strict=True)),
            "judged": folders[-1].parent.name,
            "label_source": recipe.label_source,
            "label_names": evaluation.class_names,
            "verdict": str(verdict),
            "alarm": "the pipeline leaks" if alarm else None,
        },
        {
            "accuracy": verdict.accuracy,
            "chance": chance,
            "p_value": verdict.p_value,
            "right": verdict.right,
            "texts": verdict.texts,
        },
        {"accuracy": verdict.interval},
        predictions,
    )
    if alarm:
        raise RunFault(
            f"the negative control raises the alarm: labels are random, and yet {verdict}; the pipeline leaks, so look "
            f"for evaluation texts in training and for labels made from texts ({run / 'eval' / RESULT})"
        )
    return verdict
