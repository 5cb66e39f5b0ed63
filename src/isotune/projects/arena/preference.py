"""Scores of predicted preferences: log loss with its interval, beside that of uniform guessing."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from isotune.evaluation.metrics.classification import SMALLEST, calibration_error, class_suffixes, label_statistics
from isotune.evaluation.results import CLASSIFICATION, write_result
from isotune.evaluation.statistics.resampling import Scores, Statistic, by_group, mean, score, share
from isotune.io.errors import UserError
from isotune.projects.arena.battles import CLASSES, ID, Battles, label_of, read_table

GROUP_DIGITS = 16  # of a prompt's digest: a million prompts have a collision in one of 40 million data sets
UNIFORM_LOG_LOSS = math.log(3)
NAMES = ("a", "b", "tie")  # of the classes, in results


@dataclass(frozen=True)
class PreferenceScores:
    """Log loss and accuracy of every model by its name, and all metrics of the main one, with 95% intervals."""

    names: tuple[str, ...]
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]

    def log_loss(self, name: str) -> tuple[float, tuple[float, float]]:
        """The log loss of a model, in nats per row, and its interval."""
        return self.metrics[f"log_loss_{name}"], self.intervals[f"log_loss_{name}"]

    def uniform_warning(self, name: str) -> str | None:
        """A sentence where a model is not significantly better than uniform guessing, else None."""
        loss, (low, high) = self.log_loss(name)
        if high < UNIFORM_LOG_LOSS:
            return None
        return (
            f"{name} is not better than uniform guessing with 95% confidence: log loss {loss:.4f} "
            f"[{low:.4f}, {high:.4f}], and ln 3 is {UNIFORM_LOG_LOSS:.4f}"
        )

    def table(self, remarks: dict[str, str] | None = None) -> str:
        """A line for each model, with its remark of `remarks` at the end, and the warnings below."""
        width = max(map(len, self.names))
        lines = [f"{'':<{width}}  log loss  95% interval      accuracy"]
        for name in self.names:
            loss, (low, high) = self.log_loss(name)
            remark = (remarks or {}).get(name, "")
            accuracy = self.metrics[f"accuracy_{name}"]
            lines.append(f"{name:<{width}}  {loss:.4f}    {low:.4f} - {high:.4f}   {accuracy:.3f}  {remark}".rstrip())
        return "\n".join([*lines, *filter(None, map(self.uniform_warning, self.names))])


def score_preferences(battles: Battles, predictions: dict[str, np.ndarray], *, main: str) -> PreferenceScores:
    """Score predictions, float64 [rows, 3] by model; intervals resample prompts, whose rows are not independent."""
    labels = battles.labels
    _, groups = np.unique([battle.group() for battle in battles.battles], return_inverse=True)
    statistics: list[Statistic] = []
    for name, probabilities in predictions.items():
        of_label = np.clip(probabilities[np.arange(len(labels)), labels], SMALLEST, 1.0)
        statistics.append(by_group(mean(f"log_loss_{name}", -np.log(of_label)), groups))
        statistics.append(by_group(share(f"accuracy_{name}", probabilities.argmax(axis=1) == labels), groups))
    probabilities = predictions[main]
    of_main = [
        *label_statistics(labels, probabilities.argmax(axis=1), class_suffixes(3, NAMES)),
        calibration_error(labels, probabilities),
    ]
    statistics += [by_group(statistic, groups) for statistic in of_main]
    scores = score(statistics, int(groups.max()) + 1, seed=0)
    metrics, intervals = scores.metrics, scores.intervals
    metrics["log_loss"], intervals["log_loss"] = metrics[f"log_loss_{main}"], intervals[f"log_loss_{main}"]
    return PreferenceScores(tuple(predictions), metrics, intervals)


def write_preferences(
    folder: Path, battles: Battles, predictions: dict[str, np.ndarray], *, main: str, model: str, split: str
) -> PreferenceScores:
    """Score the predictions, and write metrics.json and predictions.jsonl of the main one to `folder`.

    The `group` of a row is its prompt, so that a comparison keeps the rows of one prompt together. The model is named
    `model` in the files, and `split` describes the rows.
    """
    scores = score_preferences(battles, predictions, main=main)
    probabilities = predictions[main]
    ids = [battle.id for battle in battles.battles]
    texts = ["\n".join([*b.prompt, *b.answer_a, *b.answer_b]) for b in battles.battles]
    groups = [battle.group()[:GROUP_DIGITS] for battle in battles.battles]
    predicted, labels = probabilities.argmax(1).tolist(), battles.labels.tolist()
    columns = zip(ids, labels, predicted, probabilities.tolist(), groups, strict=True)
    write_result(
        folder,
        {
            "kind": CLASSIFICATION,
            "model": model,
            "dataset_name": battles.name,
            "dataset_split": split,
            "label_names": list(NAMES),
            "verdict": scores.uniform_warning(main) or "better than uniform guessing with 95% confidence",
        },
        Scores(scores.metrics, scores.intervals),
        [dict(zip(("id", "label", "prediction", "probabilities", "group"), row, strict=True)) for row in columns],
        texts,
    )
    return scores


def read_answers(file: Path, battles: Battles) -> Battles:
    """Test rows with the labels of a file of ids and flags; UserError if it is broken, or not of exactly these ids."""
    winners = {}
    for number, row in read_table(file, (ID, *CLASSES)):
        winners[row[ID]] = label_of(row, f"{file}, row {number} (id {row[ID]})")
    missing = [battle.id for battle in battles.battles if battle.id not in winners]
    if missing or len(winners) != len(battles):
        example = f", such as {missing[0]}" if missing else ""
        raise UserError(f"{file}: {len(missing)} of the {len(battles)} ids of {battles.name} are missing{example}, and "
                        f"{len(winners) - len(battles) + len(missing)} are of other rows")  # fmt: skip
    return replace(battles, battles=tuple(replace(battle, label=winners[battle.id]) for battle in battles.battles))
