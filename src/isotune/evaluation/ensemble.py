"""Blends what several classifiers predicted of the same rows, and writes the blend as an evaluation of its own.

Members are evaluations, so a member may be any classifier or baseline. Fitted weights minimize the log loss of held-out
predictions: each row of the written evaluation is blended with weights that were fitted without it, and without the
other rows of its group.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.model_selection import GroupKFold

from isotune.config.task_types import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from isotune.data.classification.predictions import prediction_lines
from isotune.data.classification.thresholds import THRESHOLD, Thresholds
from isotune.data.documents import digest
from isotune.evaluation.metrics.of_type import statistics_of
from isotune.evaluation.paired_results import (
    choose_results,
    class_names,
    groups_of,
    labels_and_outputs,
    ordinal_classes,
    task_type_of,
)
from isotune.evaluation.results import CLASSIFICATION, Result, claim_folder, write_aligned_result
from isotune.evaluation.statistics.blending import (
    Splits,
    blend,
    blend_weights,
    held_out_blend,
    probabilities_of_truth,
    weighted_sum,
)
from isotune.evaluation.statistics.resampling import RESAMPLES, Scores, by_group, score
from isotune.io.errors import UserError

EQUAL, FITTED = "equal", "fitted"
SHOWN = ("log_loss", "accuracy", "mean_squared_error")  # of the table, as far as the kind of labels has them


@dataclass(frozen=True)
class Member:
    """One of the evaluations that are blended."""

    result: Result
    weight: float  # fitted on all rows: what new rows are to be blended with
    loss: float | None  # log loss on the same rows, in nats a row, or a label; None of a regression


@dataclass(frozen=True)
class Ensemble:
    """A written blend."""

    folder: Path
    weights: str
    members: list[Member]
    scores: Scores
    loss: float | None

    def table(self) -> str:
        """A line for each member, and the metrics of the blend with their intervals."""
        width = max(len(str(member.result.folder)) for member in self.members)
        lines = [f"{'':<{width}}  weight  log loss"]
        for member in self.members:
            loss = "" if member.loss is None else f"{member.loss:.4f}"
            lines.append(f"{member.result.folder!s:<{width}}  {member.weight:<6.3f}  {loss}".rstrip())
        if self.loss is not None:
            best = min(self.members, key=lambda member: member.loss or 0.0)
            side = "below" if self.loss < (best.loss or 0.0) else "not below"
            lines.append(f"{'the blend':<{width}}          {self.loss:.4f}  {side} the best member's")
        for name in SHOWN:
            if name in self.scores.metrics:
                low, high = self.scores.intervals[name]
                lines.append(f"{name:<10}  {self.scores.metrics[name]:.4f}  95% interval {low:.4f} to {high:.4f}")
        return "\n".join([*lines, f"written to {self.folder}"])


def build_ensemble(
    runs: Sequence[str | Path],
    output_dir: str | Path,
    *,
    weights: str = EQUAL,
    name: str | None = None,
    folds: int = 5,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Ensemble:
    """Blend the evaluations of runs on the same rows, and write OUTPUT_DIR/eval/NAME.

    Rows are aligned by their ids and contents and classes by their names, as in a comparison, which also says how
    `name` chooses among several evaluations. UserError where there are fewer than two, rows or classes differ, one is
    of generated answers, there are fewer groups of rows than folds, or weights are to be fitted for a regression.
    """
    if len(runs) < 2:
        raise UserError("an ensemble needs two runs or more")
    if weights not in (EQUAL, FITTED):
        raise UserError(f"--weights is {weights}: it is {EQUAL} or {FITTED}")
    for option, number, least in (("--folds", folds, 2), ("--seed", seed, 0), ("--resamples", resamples, 100)):
        if number < least:
            raise UserError(f"{option} is {number}: it is at least {least}")
    results = choose_results(runs, name)
    first = results[0]
    if first.facts["kind"] != CLASSIFICATION:
        raise UserError(f"{first.folder} is a {first.facts['kind']} result: an ensemble blends those of classifiers")
    task_type = task_type_of(first)
    if task_type == REGRESSION and weights == FITTED:
        raise UserError("--weights fitted is for probabilities, and these are numbers: their mean is --weights equal")
    labels, outputs = _aligned(results, task_type)
    groups = groups_of(results)
    fitted = np.full(len(results), 1 / len(results))
    if weights == FITTED:
        fitted = blend_weights(outputs, labels)
        blended = held_out_blend(outputs, labels, _splits(len(labels), groups, folds, seed))
    else:
        blended = blend(outputs, fitted) if task_type == SINGLE_LABEL else weighted_sum(outputs, fitted)
    names = class_names(first)
    thresholds = _common_thresholds(results)
    statistics = statistics_of(
        task_type, labels, blended, ordinal=ordinal_classes(first), names=names, thresholds=thresholds
    )
    units = len(labels) if groups is None else int(groups.max()) + 1
    if groups is not None:
        statistics = [by_group(statistic, groups) for statistic in statistics]
    scores = score(statistics, units, resamples=resamples, seed=seed)
    members = [
        Member(result, float(weight), _loss(own, labels, task_type))
        for result, weight, own in zip(results, fitted, outputs, strict=True)
    ]
    how = {"weights": weights, **({"folds": folds, "seed": seed} if weights == FITTED else {})}
    folder = _claimed(Path(output_dir), results, {**how, "resamples": resamples})
    lines = prediction_lines(task_type, [row["id"] for row in first.predictions], labels, blended, names, thresholds)
    if groups is not None:
        lines = [{**line, "group": row["group"]} for line, row in zip(lines, _grouped(results), strict=True)]
    facts = {
        "kind": CLASSIFICATION,
        "model": f"ensemble of {', '.join(str(result.folder) for result in results)}",
        **{key: first.facts[key] for key in ("dataset_name", "dataset_split")},
        "task_type": task_type,
        "label_names": first.facts.get("label_names"),
        "ordinal": ordinal_classes(first),
        **({"label_thresholds": np.atleast_1d(thresholds).tolist()} if task_type == MULTI_LABEL else {}),
        "undefined": scores.undefined,
        "ensemble": {
            **how,
            "members": [{"result": str(m.result.folder), "weight": m.weight, "log_loss": m.loss} for m in members],
        },
    }
    write_aligned_result(folder, facts, scores, lines, first.facts["rows_sha256"])
    return Ensemble(folder, weights, members, scores, _loss(blended, labels, task_type))


def _common_thresholds(results: Sequence[Result]) -> Thresholds:
    """From which probabilities the members say that a row has a label; UserError where they differ."""
    own = [result.facts.get("label_thresholds") or [THRESHOLD] for result in results]
    size = max(map(len, own))
    filled = [np.broadcast_to(one, size).tolist() for one in own]
    for result, one in zip(results, filled, strict=True):
        if one != filled[0]:
            raise UserError(
                f"{results[0].folder} and {result.folder} have other label thresholds ({filled[0]} and {one}): "
                "evaluate both with the same --label_thresholds"
            )
    return own[0] if len(own[0]) > 1 else own[0][0]


def _aligned(results: Sequence[Result], task_type: str) -> tuple[np.ndarray, list[np.ndarray]]:
    """The labels of the rows, and what each member predicted of them; UserError where members have other classes."""
    labels, outputs = labels_and_outputs(results[0], task_type)
    of_all = [outputs]
    for result in results[1:]:
        _, other = labels_and_outputs(result, task_type)
        if other.shape != outputs.shape:
            both = f"{results[0].folder} and {result.folder}"
            raise UserError(f"{both} cannot be blended: {outputs.shape[-1]} and {other.shape[-1]} classes")
        of_all.append(other)
    return labels, of_all


def _splits(rows: int, groups: np.ndarray | None, folds: int, seed: int) -> Splits:
    """The folds of the cross-validation, which never splits a group."""
    own = np.arange(rows) if groups is None else groups
    if (there := len(np.unique(own))) < folds:
        raise UserError(f"--folds is {folds}, and there are {there} rows, or groups of them")
    return list(GroupKFold(folds, shuffle=True, random_state=seed).split(own, groups=own))


def _loss(outputs: np.ndarray, labels: np.ndarray, task_type: str) -> float | None:
    return None if task_type == REGRESSION else float(-np.log(probabilities_of_truth(outputs, labels)).mean())


def _grouped(results: Sequence[Result]) -> list[dict[str, Any]]:
    """The predictions of a result whose rows have groups."""
    return next(result.predictions for result in results if all("group" in row for row in result.predictions))


def _claimed(output_dir: Path, results: Sequence[Result], how: dict[str, Any]) -> Path:
    """OUTPUT_DIR/eval/NAME, or beside it where that holds another ensemble."""
    first = results[0]
    members = [digest(result.predictions) for result in results]
    facts = {"dataset_name": first.facts["dataset_name"], "data": first.facts["rows_sha256"], "members": members, **how}
    return claim_folder(output_dir / "eval" / first.folder.name, facts, is_named=False)
