"""Blends what several classifiers predicted of the same rows, and writes the blend as an evaluation of its own.

Members are evaluations, so a member may be any classifier or baseline. Fitted weights minimize the log loss of held-out
predictions: each row of the written evaluation is blended with weights that were fitted without it, and without the
other rows of its group.
"""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.model_selection import GroupKFold

from isotune.config.recipes import project_of, task_of
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
    with_classes_of,
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
from isotune.io.files import replace_file
from isotune.io.run_files import ENSEMBLE, or_empty, read_recipe_values

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
    fitted_on: str | None  # the evaluation whose labels fitted the weights; None of equal ones
    predicts_with: Path | None  # OUT/ensemble.json; None where a member is no run of a classifier

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
        if self.fitted_on is not None:
            lines.append(f"note        the weights were fitted to the labels of {self.fitted_on}")
        if self.predicts_with is not None:
            lines.append(f"predicts    isotune predict {shlex.quote(str(self.predicts_with.parent))} TEXT ...")
        return "\n".join([*lines, f"written to {self.folder}"])


def build_ensemble(
    runs: Sequence[str | Path],
    output_dir: str | Path,
    *,
    weights: str = EQUAL,
    name: str | None = None,
    fit_on: str | None = None,
    folds: int = 5,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Ensemble:
    """Blend the evaluations of runs on the same rows, and write OUTPUT_DIR/eval/NAME and OUTPUT_DIR/ensemble.json.

    Weights are fitted to the same rows, each row blended by weights that were fitted without it; with `fit_on`, the
    name of another evaluation of the runs, to the rows of that, and no label of the blended rows is seen.

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
    if fit_on is not None and weights != FITTED:
        raise UserError("--fit_on has no effect on equal weights: say --weights fitted")
    labels, outputs = _aligned(results, task_type)
    groups = groups_of(results)
    fitted, fitted_on = np.full(len(results), 1 / len(results)), None
    if weights == FITTED and fit_on is None:
        fitted = blend_weights(outputs, labels)
        fitted_on = f"these rows; each row is blended by weights of the other {folds - 1} of {folds} folds"
        blended = held_out_blend(outputs, labels, _splits(len(labels), groups, folds, seed))
    else:
        if fit_on is not None:
            others = _to_fit_on(runs, fit_on, results)
            labels_seen, outputs_seen = _aligned(others, task_type)
            fitted, fitted_on = blend_weights(outputs_seen, labels_seen), others[0].folder.name
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
    how: dict[str, Any] = {"weights": weights}
    if weights == FITTED:
        how |= {"folds": folds, "seed": seed} if fit_on is None else {"fit_on": fit_on}
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
        "ensemble": {
            **how,
            "members": [{"result": str(m.result.folder), "weight": m.weight, "log_loss": m.loss} for m in members],
        },
    }
    write_aligned_result(folder, facts, scores, lines, first.facts["rows_sha256"])
    saved = _write_members(Path(output_dir), members, task_type, names, thresholds)
    return Ensemble(folder, weights, members, scores, _loss(blended, labels, task_type), fitted_on, saved)


def _to_fit_on(runs: Sequence[str | Path], name: str, results: Sequence[Result]) -> list[Result]:
    """The evaluation `name` of the runs, with classes in the order of the blended one; UserError for the same rows."""
    found = choose_results(runs, name)
    if found[0].facts["rows_sha256"] == results[0].facts["rows_sha256"]:
        raise UserError(f"--fit_on {name} has the rows that are blended: leave it out, or name other rows")
    return [with_classes_of(results[0], one) for one in found]


def _write_members(
    output_dir: Path, members: Sequence[Member], task_type: str, names: list[str] | None, thresholds: Thresholds
) -> Path | None:
    """What predicts new rows; None, and no such file, where a member is no run that `isotune predict` opens."""
    file, runs = output_dir / ENSEMBLE, [member.result.folder.resolve().parents[1] for member in members]
    if not all(_classifies(run) for run in runs):
        file.unlink(missing_ok=True)
        return None
    content = {
        "members": [{"run": str(run), "weight": one.weight} for run, one in zip(runs, members, strict=True)],
        "task_type": task_type,
        "label_names": names,
        "label_thresholds": np.atleast_1d(thresholds).tolist() if task_type == MULTI_LABEL else None,
    }
    replace_file(file, json.dumps(content, indent=2) + "\n")
    return file


def _classifies(run: Path) -> bool:
    """Whether a folder is a finished run of a classifier of texts."""
    recipe = or_empty(read_recipe_values, run)
    return (run / "model").is_dir() and task_of(recipe) == "classification" and project_of(recipe) is None


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
