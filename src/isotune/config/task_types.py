"""The kinds of classification: what a label is, which metrics choose the best model, and which keys have no meaning."""

from collections.abc import Mapping
from typing import Any, Literal

TaskType = Literal["auto", "single_label", "multi_label", "regression"]
SINGLE_LABEL, MULTI_LABEL, REGRESSION = "single_label", "multi_label", "regression"

# The metrics of an evaluation in training, of which one may choose the best model.
EVAL_METRICS: dict[str, tuple[str, ...]] = {
    SINGLE_LABEL: ("eval_loss", "eval_accuracy", "eval_f1_macro"),
    MULTI_LABEL: ("eval_loss", "eval_f1_micro", "eval_f1_macro", "eval_exact_match"),
    REGRESSION: ("eval_loss", "eval_pearson", "eval_spearman", "eval_mean_absolute_error", "eval_r2"),
}
ALL_EVAL_METRICS = tuple(dict.fromkeys(name for names in EVAL_METRICS.values() for name in names))
# Those for which higher is better.
HIGHER_IS_BETTER = frozenset(ALL_EVAL_METRICS) - {"eval_loss", "eval_mean_absolute_error"}
WITHOUT_CLASSES = ("label_names", "num_labels")


def is_higher_better(metric: str, keys: Mapping[str, Any]) -> bool:
    """Whether a metric is better where it is higher, by a run's recipe: that of a script says it, of any metric."""
    said = keys.get("greater_is_better")
    return metric in HIGHER_IS_BETTER if said is None else bool(said)


def wrong_for_type(values: Mapping[str, Any], task_type: str) -> str | None:
    """What is wrong among a recipe's values where its labels are of this kind."""
    metric = values["metric_for_best_model"]
    if metric is not None and metric not in EVAL_METRICS[task_type]:
        return f"metric_for_best_model is {metric}, and {task_type} has {', '.join(EVAL_METRICS[task_type])}"
    if values["label_thresholds"] is not None and task_type != MULTI_LABEL:
        return f"label_thresholds are of multi_label: leave them out for {task_type}"
    if task_type == SINGLE_LABEL:
        return None
    if task_type == REGRESSION:
        for key in WITHOUT_CLASSES:
            if values[key] is not None:
                return f"regression predicts one number: leave out {key} (or say none)"
        if values["class_weights"] is not None:
            return "class_weights are of classes and labels: regression weighs every document alike"
    if values["label_smoothing_factor"]:
        return f"label_smoothing_factor is of single_label: leave it out for {task_type}"
    return None
