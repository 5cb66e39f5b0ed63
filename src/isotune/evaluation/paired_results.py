"""Finds the evaluations of several runs on the same rows, puts their rows in one order, and measures each row."""

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from isotune.config.task_types import MULTI_LABEL, SINGLE_LABEL
from isotune.data.class_index import NameIndex, listed
from isotune.data.classification.predictions import predicted
from isotune.data.classification.thresholds import THRESHOLD, Thresholds
from isotune.evaluation.metrics.classification import classification_statistics
from isotune.evaluation.metrics.of_type import statistics_of
from isotune.evaluation.metrics.text import Likelihood, measure_likelihoods, measure_texts
from isotune.evaluation.results import (
    CLAIM,
    CLASSIFICATION,
    GENERATION,
    METRICS,
    PREDICTIONS,
    Result,
    find_results,
    read_result,
    stray_results,
)
from isotune.evaluation.statistics.resampling import Statistic, by_group
from isotune.io import shipped
from isotune.io.errors import UserError

DATA_KEYS = ("label", "reference", "prompt", "text_sha256", "group")  # of a row, from the data and not the model


def choose_results(runs: Sequence[str | Path], name: str | None = None) -> list[Result]:
    """The result of each run (RUN or RUN/eval/NAME) that pairs with those of the others, rows in the first one's order.

    It is that of the evaluation `name`, or else the one that all runs have, by name or by rows. UserError where a
    folder holds no such result, several are common, or rows differ.
    """
    first, *others = [read_result(folder) for folder in _choose_folders([Path(run) for run in runs], name)]
    if not first.predictions:
        raise UserError(f"{first.folder} has no rows: there is nothing to compare")
    return [first, *(_in_order(first, with_classes_of(first, other)) for other in others)]


def groups_of(results: Sequence[Result]) -> np.ndarray | None:
    """The group of each row, int64 [rows] from 0; None where the rows have no groups or each is a group of its own."""
    for result in results:
        names = [row.get("group") for row in result.predictions]
        if None not in names:
            groups, numbers = np.unique([str(name) for name in names], return_inverse=True)
            return numbers if len(groups) < len(names) else None
    return None


def _choose_folders(runs: list[Path], name: str | None) -> list[Path]:
    by_name = [_evaluations(run) for run in runs]
    if name is None and all(len(folders) == 1 for folders in by_name):
        return [folder for folders in by_name for folder in folders.values()]  # _in_order checks their rows
    common = {name} if name else set.intersection(*map(set, by_name))
    if len(common) > 1:
        raise UserError(f"the runs have several evaluations in common: {', '.join(sorted(common))}; choose by --name")
    for chosen in common:
        for run, folders in zip(runs, by_name, strict=True):
            if chosen not in folders:
                raise UserError(f"{run} has no evaluation {chosen!r}: it has {', '.join(folders)}")
        return [folders[chosen] for folders in by_name]
    # results on the same rows under different names, where there is exactly one in each run
    digests = [{folder: read_result(folder).facts["rows_sha256"] for folder in folders.values()} for folders in by_name]
    for digest in digests[0].values():
        matches = [[folder for folder, other in of_run.items() if other == digest] for of_run in digests]
        if all(len(folders) == 1 for folders in matches):
            return [folders[0] for folders in matches]
    names = "; ".join(f"{run} has {', '.join(folders)}" for run, folders in zip(runs, by_name, strict=True))
    raise UserError(f"no evaluation is common to the runs: {names}")


def _evaluations(run: Path) -> dict[str, Path]:
    """The results of a run by name; a folder that is a result itself is the only one."""
    if not run.is_dir():
        raise UserError(f"there is no folder {run}")
    folders = [run] if (run / METRICS).is_file() else find_results(run)
    if not folders and (strays := stray_results(run)):
        raise UserError(strays[0])
    if not folders:
        scripts = " or ".join(dict.fromkeys(shipped.script(f"eval/{name}.py") for name in ("classify", "generate")))
        what, of_run = "holds no evaluation", run
        if (run / PREDICTIONS).is_file():  # metrics.json is written last, and training writes none
            what = "holds no finished evaluation" if (run / CLAIM).exists() else "is an evaluation made in training"
            of_run = run.parents[1] if run.parent.name == "eval" else run
        how = f"{scripts} with --run_dir {of_run}" if shipped.IS_CHECKOUT else f"{scripts} {of_run}"
        raise UserError(f"{run} {what}: run {how}")
    return {folder.name: folder for folder in folders}


def _in_order(first: Result, other: Result) -> Result:
    """`other` with its rows in the order of `first`; results of different kinds or rows are refused."""
    pair = f"{first.folder} and {other.folder} cannot be compared"
    if first.facts["kind"] != other.facts["kind"]:
        raise UserError(f"{pair}: one is a {first.facts['kind']} result, the other a {other.facts['kind']} result")
    ours, theirs = ({row["id"]: row for row in result.predictions} for result in (first, other))
    if task_type_of(first) != task_type_of(other):
        raise UserError(f"{pair}: one is of {task_type_of(first)}, the other of {task_type_of(other)}")
    if ours.keys() != theirs.keys() and {*map(str, ours)} == {*map(str, theirs)}:
        raise UserError(
            f"{pair}: the ids are numbers in one and texts in the other, as those of a CSV are: evaluate both on one "
            "file"
        )
    differences = []
    for result, own, others in ((first, ours, theirs), (other, theirs, ours)):
        if only := [str(row_id) for row_id in own if row_id not in others]:
            shown = ", ".join(only[:3]) + (", ..." if len(only) > 3 else "")
            differences.append(f"{len(only):,} row{'s' if len(only) > 1 else ''} only in {result.folder} (id {shown})")
    if differences:
        rows = f"{len(ours):,} and {len(theirs):,} rows"
        raise UserError(f"{pair}: {rows}; {'; '.join(differences)}{_source(first, other)}")
    for row_id, row in ours.items():
        for key in DATA_KEYS:
            if key in row and key in theirs[row_id] and row[key] != theirs[row_id][key]:
                one, another = _short(row[key]), _short(theirs[row_id][key])
                raise UserError(f"{pair}: row {row_id!r} has the {key} {one} in one and {another} in the other")
    if first.facts["rows_sha256"] != other.facts["rows_sha256"]:
        what = "the ids are the same, but not the texts of the rows or their order"
        raise UserError(f"{pair}: {what}{_source(first, other)}")
    return replace(other, predictions=[theirs[row_id] for row_id in ours])


def _source(first: Result, other: Result) -> str:
    for key in ("dataset_name", "dataset_split"):
        if first.facts[key] != other.facts[key]:
            return f"; {key} is {first.facts[key]} in one and {other.facts[key]} in the other"
    return ""


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


@dataclass(frozen=True)
class MeasuredRows:
    """What a comparison needs of a result."""

    # every built-in metric by name, over groups of rows where there are groups; names of one statistic share it
    statistics: dict[str, Statistic]
    right_means: str  # empty where no row is right or wrong
    right: np.ndarray  # bool [rows]; `right_means` is the metric that is their share
    # float64 [rows], higher is better: the probability of the row's class, minus the distance from its labels or its
    # number, or chrF of its text
    scores: np.ndarray
    classes: int | None = None  # of a classifier, None for texts


def measure_rows(result: Result, groups: np.ndarray | None) -> MeasuredRows:
    """Measure a result by its predictions; `groups` has the group of each row. UserError where a row lacks a key."""
    kind = result.facts["kind"]
    task_type = task_type_of(result)
    if kind == CLASSIFICATION and task_type != SINGLE_LABEL:
        labels, outputs = labels_and_outputs(result, task_type)
        thresholds: Thresholds = result.facts.get("label_thresholds") or THRESHOLD  # earlier results name none
        statistics = statistics_of(task_type, labels, outputs, names=class_names(result), thresholds=thresholds)
        scores = -np.abs(outputs - labels).reshape(len(labels), -1).sum(axis=1)
        several = task_type == MULTI_LABEL  # a number is more or less wrong, and no row is right
        classes = labels.shape[1] if several else None
        chosen = predicted(task_type, outputs, thresholds)
        right = (chosen == labels).all(axis=1) if several else np.zeros(len(labels), np.bool_)
        right_means = "exact_match" if several else ""
    elif kind == CLASSIFICATION:
        labels, probabilities = labels_and_outputs(result, task_type)
        statistics = classification_statistics(
            labels, probabilities, ordinal=ordinal_classes(result), names=class_names(result)
        )
        scores, classes = probabilities[np.arange(len(labels)), labels], probabilities.shape[1]
        right_means, right = "accuracy", probabilities.argmax(axis=1) == labels
    elif kind == GENERATION:
        statistics, classes = _text_statistics(result), None
        right_means = "exact_match"
        right = np.array([row["text"] == row["reference"].strip() for row in result.predictions])
        scores = np.array([row.get("chrf", row.get("exact_match", 0.0)) for row in result.predictions], np.float64)
    else:
        raise UserError(f"{result.folder}: a result of the kind {kind!r} cannot be compared")
    if groups is not None:
        statistics = [by_group(statistic, groups) for statistic in statistics]
    by_name = {name: statistic for statistic in statistics for name in statistic.names}
    return MeasuredRows(by_name, right_means, right, scores, classes)


def class_names(result: Result) -> list[str] | None:
    """The names of a result's classes; None where their numbers stand for them."""
    names = result.facts.get("label_names")
    if not isinstance(names, list) or [str(name) for name in names] == [str(k) for k in range(len(names))]:
        return None
    return [str(name) for name in names]


def with_classes_of(first: Result, other: Result) -> Result:
    """`other` with its classes in the order of `first`, by their names; UserError where the names are others.

    Numbers are compared where one of the two has no names.
    """
    names, others = class_names(first), class_names(other)
    if names is None or others is None or names == others:
        return other
    order = NameIndex(others).order_of(names)
    if order is None:
        raise UserError(
            f"{first.folder} and {other.folder} cannot be compared: the classes are {listed(names)} in one and "
            f"{listed(others)} in the other"
        )
    place = {k: new for new, k in enumerate(order)}
    rows = [dict(row) for row in other.predictions]
    for row in rows:
        for key in ("label", "prediction"):
            if isinstance(row.get(key), list):
                row[key] = sorted(place[k] for k in row[key] if k in place)
            elif row.get(key) in place:
                row[key] = place[row[key]]
        if isinstance(row.get("probabilities"), list) and len(row["probabilities"]) == len(order):
            row["probabilities"] = [row["probabilities"][k] for k in order]
    facts = {**other.facts, "label_names": names}
    if len(own := facts.get("label_thresholds") or ()) == len(order):
        facts["label_thresholds"] = [own[k] for k in order]
    return replace(other, predictions=rows, facts=facts)


def _labels_and_probabilities(result: Result) -> tuple[np.ndarray, np.ndarray]:
    """int64 [rows] and float64 [rows, classes]."""
    where = result.folder / PREDICTIONS
    try:
        probabilities = np.array([row["probabilities"] for row in result.predictions], np.float64)
        labels = np.array([row["label"] for row in result.predictions])
    except (KeyError, ValueError, TypeError, OverflowError):
        raise UserError(f"{where}: a row has no label, or not as many probabilities as others") from None
    classes = probabilities.shape[1] if probabilities.ndim == 2 else 0
    if labels.dtype.kind != "i" or not 0 <= labels.min() <= labels.max() < classes:
        raise UserError(f"{where}: a label is not a class among those with a probability")
    return labels, probabilities


def ordinal_classes(result: Result) -> bool:
    """Whether the classes are ordered, by the metrics that were computed."""
    return "quadratic_kappa" in result.metrics or "mean_absolute_error" in result.metrics


def task_type_of(result: Result) -> str:
    """What kind of labels a classifier's result is of."""
    return result.facts.get("task_type", SINGLE_LABEL)


def labels_and_outputs(result: Result, task_type: str) -> tuple[np.ndarray, np.ndarray]:
    """Of classes int64 [rows] and float64 [rows, classes]; of several labels both [rows, labels]; of numbers [rows]."""
    if task_type == SINGLE_LABEL:
        return _labels_and_probabilities(result)
    rows, where = result.predictions, result.folder / PREDICTIONS
    try:
        if task_type != MULTI_LABEL:
            labels, outputs = (np.array([row[key] for row in rows], np.float64) for key in ("label", "prediction"))
            return labels, outputs
        outputs = np.array([row["probabilities"] for row in rows], np.float64)
        labels = np.zeros(outputs.shape, np.int64)
        for number, row in enumerate(rows):
            # numpy would take None for every label, -1 for the last and truth values for a mask
            if not all(type(label) is int and 0 <= label < outputs.shape[1] for label in row["label"]):
                raise ValueError
            labels[number, row["label"]] = 1
        return labels, outputs
    except (KeyError, ValueError, TypeError, IndexError, OverflowError):
        raise UserError(f"{where}: a row has no label or prediction, or other labels than its probabilities") from None


def _text_statistics(result: Result) -> list[Statistic]:
    rows = result.predictions
    try:
        texts, references = [row["text"] for row in rows], [row["reference"] for row in rows]
    except KeyError as missing:
        raise UserError(f"{result.folder / PREDICTIONS}: a row has no {missing}") from None
    ended = [row.get("ended") for row in rows]
    measured = measure_texts(texts, references, [bool(value) for value in ended])
    if None in ended:  # their task did not measure it
        del measured["ended"]
    with suppress(KeyError, ValueError, ZeroDivisionError):  # not every row has a likelihood
        likelihoods = [_likelihood(row) for row in rows]
        measured |= measure_likelihoods(likelihoods)
    return [metric.of_all for metric in measured.values()]


def _likelihood(row: dict[str, Any]) -> Likelihood:
    nll = row["nll"]
    tokens, byte_count = nll / math.log(row["perplexity"]), nll / (row["bits_per_byte"] * math.log(2))
    return Likelihood(nll, round(tokens), round(byte_count))
