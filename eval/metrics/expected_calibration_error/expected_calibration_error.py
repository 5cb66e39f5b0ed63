"""How far, over 15 bins, sure is from right (Guo et al. 2017).

evaluate.load("eval/metrics/expected_calibration_error").compute(predictions=..., references=...)
"""

from typing import Any

import evaluate

from isotune.evaluation.metrics.modules import of_probabilities, probability_info


class ExpectedCalibrationError(evaluate.Metric):
    """`expected_calibration_error` as eval/classify.py computes it."""

    def _info(self) -> evaluate.MetricInfo:
        return probability_info(__doc__)

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:  # type: ignore[override]
        return {"expected_calibration_error": of_probabilities(predictions, references)["expected_calibration_error"]}
