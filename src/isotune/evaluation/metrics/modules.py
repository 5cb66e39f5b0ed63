"""Metrics that a task takes from `evaluate` modules, a local folder or the Hub, as docs/evaluation.md describes them.

A result is called MODULE/METRIC. A module takes the columns of its own features; its interval is the bootstrap over
rows with MODULE_RESAMPLES draws, because the module is computed again on each of them.
"""

import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from isotune.evaluation.statistics.resampling import RESAMPLES, OfWeights, Scores, score, without_class
from isotune.io.errors import UserError, first_line
from isotune.io.extras import need
from isotune.io.shipped import ROOT

MODULE_RESAMPLES = 200  # from seed to seed the ends of an interval move by about 10% of its width
Column = tuple[str, str]  # a name of a module's features and a kind of values: int, float, string, list of float ...


def text_columns(predictions: Sequence[str], references: Sequence[str], sources: Sequence[str]) -> dict[Column, Any]:
    """The columns of an evaluation of texts."""
    return {
        ("predictions", "string"): np.array(predictions, object),
        ("references", "string"): np.array(references, object),
        ("references", "list of string"): np.array([[reference] for reference in references], object),
        ("sources", "string"): np.array(sources, object),
    }


def class_columns(labels: np.ndarray, probabilities: np.ndarray) -> dict[Column, np.ndarray]:
    """The columns of a classification; `prediction_scores` are the probabilities of class 1, or of all classes."""
    predictions = probabilities.argmax(axis=1)
    return {
        ("predictions", "int"): predictions,
        ("predictions", "float"): predictions.astype(np.float64),
        ("predictions", "list of float"): probabilities,
        ("prediction_scores", "float"): probabilities[:, 1],
        ("prediction_scores", "list of float"): probabilities,
        ("references", "int"): labels,
        ("references", "float"): labels.astype(np.float64),
    }


# the columns of each kind of evaluation
TEXTS = frozenset(text_columns([""], [""], [""]))
CLASSES = frozenset(class_columns(np.zeros(1, np.int64), np.full((1, 2), 0.5)))


@dataclass(frozen=True)
class MetricModule:
    """A loaded `evaluate` module."""

    name: str  # before the names of its results
    where: str  # file and key that name it, for messages
    module: Any
    columns: tuple[Column, ...]
    # `module` and `config_name`, which `evaluate.load` was given, and the `arguments` of `compute`
    facts: dict[str, Any]

    def compute(self, data: Mapping[Column, np.ndarray], rows: np.ndarray | slice = slice(None)) -> dict[str, float]:
        """The module's results that are numbers, by name, on some of the rows."""
        given = {name: list(data[name, kind][rows]) for name, kind in self.columns}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results = self.module.compute(**given, **self.facts["arguments"]) or {}
        arrays = {f"{self.name}/{key}": np.asarray(value) for key, value in results.items()}
        return {key: float(value) for key, value in arrays.items() if value.ndim == 0 and value.dtype.kind in "iufb"}

    def statistic(self, data: Mapping[Column, np.ndarray], rows: int) -> OfWeights:
        """The results as a statistic of weighted rows, NaN where a resample has none; UserError without any."""
        called = f"{self.where}: the module {self.facts['module']!r}"
        try:
            names = tuple(self.compute(data))
        except Exception as error:  # a module is foreign code
            raise UserError(f"{called} cannot be computed: {first_line(error)}") from error
        if not names:
            raise UserError(f"{called} returns no number")

        def of_weights(weights: np.ndarray) -> np.ndarray:
            values = np.full((len(weights), len(names)), math.nan)
            for draw, counts in enumerate(weights):
                try:
                    results = self.compute(data, np.repeat(np.arange(rows), counts))
                except Exception:
                    continue
                values[draw] = [results.get(name, math.nan) for name in names]
            return values

        return OfWeights(names, rows, of_weights)


def split_metrics(metrics: Sequence[str | MetricModule]) -> tuple[list[str], list[MetricModule]]:
    """The built-in names of a task's metrics, and its modules."""
    modules = [metric for metric in metrics if isinstance(metric, MetricModule)]
    return [metric for metric in metrics if isinstance(metric, str)], modules


def read_metrics(
    entries: Sequence[Any], builtin: Collection[str], columns: Collection[Column], where: str
) -> tuple[str | MetricModule, ...]:
    """The entries of a task's `metrics:`, with every module loaded; `columns` are what such an evaluation has.

    UserError, which begins with `where`: an entry is neither a name nor a mapping with `module`, or a module cannot be
    loaded, takes columns that the evaluation does not have, or has the name of another one.
    """
    metrics: list[str | MetricModule] = []
    for entry in entries:
        # f1_class_0 and its like are built in too, but no text has a class
        if isinstance(entry, str) and (entry if columns is TEXTS else without_class(entry)) in builtin:
            metrics.append(entry)
            continue
        arguments = {"module": entry} if isinstance(entry, str) else dict(entry)
        source, config_name = arguments.pop("module", None), arguments.pop("config_name", None)
        if not isinstance(source, str):
            raise UserError(f"{where}: {str(entry)[:60]!r} is no metric: it takes a name, or a mapping with `module`")
        name = arguments.pop("name", None) or Path(source).name.removesuffix(".py")
        if any(isinstance(metric, MetricModule) and metric.name == name for metric in metrics):
            raise UserError(f"{where}: two modules are called {name!r}: give one of them another `name`")
        module = _load(source, config_name, builtin, where)
        features = module.features if isinstance(module.features, list) else [module.features]
        takes = [[(column, _kind(feature)) for column, feature in one.items()] for one in features]
        needed = next((tuple(one) for one in takes if all(column in columns for column in one)), None)
        if needed is None:
            what = f"the module takes {' or '.join(map(_listed, takes))}; there are {_listed(sorted(columns))}"
            raise UserError(f"{where}: there is no metric {source!r} here: {what}")
        facts = {"module": source, "config_name": config_name, "arguments": arguments}
        metrics.append(MetricModule(name, where, module, needed, facts))
    return tuple(metrics)


def score_modules(
    modules: Sequence[MetricModule],
    data: Mapping[Column, np.ndarray],
    rows: int,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Scores:
    """Values and intervals of modules over rows with the columns `data`, by at most MODULE_RESAMPLES resamples."""
    draws = min(resamples, MODULE_RESAMPLES)
    scores = Scores({}, {})
    for module in modules:
        statistic = module.statistic(data, rows)
        facts = {**module.facts, "metrics": list(statistic.names), "resamples": draws}
        scores |= score([statistic], rows, resamples=draws, seed=seed) | Scores({}, {}, modules=[facts])
    return scores


def _load(source: str, config_name: str | None, builtin: Collection[str], where: str) -> Any:
    need("evaluate", f"the metric module {source!r}")
    import evaluate

    if not Path(source).exists() and (ROOT / source).exists():
        source = str(ROOT / source)
    try:
        return evaluate.load(source, config_name, keep_in_memory=True)
    except Exception as error:  # a module is foreign code
        what = f"the module {source!r} cannot be loaded"
        if not Path(source).exists():
            names = ", ".join(builtin)
            what = f"there is no metric {source!r}: it is not built in ({names}), and evaluate.load does not find it"
        raise UserError(f"{where}: {what}: {first_line(error)}") from error


def _kind(feature: Any) -> str:
    inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
    if inner is not None:
        return f"list of {_kind(inner)}"
    dtype = str(getattr(feature, "dtype", type(feature).__name__)).removeprefix("large_")
    return next((kind for kind in ("int", "float", "string") if dtype.removeprefix("u").startswith(kind)), dtype)


def _listed(columns: Sequence[Column]) -> str:
    return ", ".join(f"{name} ({kind})" for name, kind in columns)
