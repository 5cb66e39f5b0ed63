"""The steps between two lines of metrics.jsonl: their sums are exact, and a checkpoint keeps them."""

import json
import math
from fractions import Fraction

from hypothesis import given, settings
from hypothesis import strategies as st

from isotune.training.recorder import EpochAverages, StepSums

losses = st.floats(1e-8, 1e8) | st.just(math.nan)
steps = st.tuples(losses, st.integers(1, 64), st.floats(1e-4, 1e3), st.integers(0, 64))


def lines_of(drawn: list[tuple[float, int, float, int]]) -> list[dict]:
    return [
        {
            "step": number, "loss": loss, "accuracy": min(right, count) / count, "input_tokens": 7 * count,
            "documents": count, "step_seconds": seconds, "tokens_per_second": 7 * count / seconds,
            "grad_norm": 1.0 / number,
        }
        for number, (loss, count, seconds, right) in enumerate(drawn, start=1)
    ]  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(st.lists(steps, min_size=2, max_size=12), st.integers(0, 12))
def test_the_line_of_several_steps_is_the_same_wherever_the_run_went_on(drawn, cut):
    whole, parts, lines = StepSums(), StepSums(), lines_of(drawn)
    averages = EpochAverages("\n".join(map(json.dumps, lines)))
    resumed = EpochAverages()
    for number, line in enumerate(lines):
        if number == cut:
            parts = StepSums(json.loads(json.dumps(parts.state())))
            resumed = EpochAverages(state=json.loads(json.dumps(resumed.state())))
        whole.add(line)
        parts.add(line)
        resumed.add(line)
    found, other = whole.take(), parts.take()
    assert json.dumps(found) == json.dumps(other)
    assert resumed.take() == averages.take()
    finite = [Fraction(line["loss"]) for line in lines if math.isfinite(line["loss"])]
    if finite:
        assert found["loss"] == float(sum(finite) / len(finite))
    else:
        assert math.isnan(found["loss"])
    assert found["step_seconds"] == math.fsum(line["step_seconds"] for line in lines)
    assert (found["documents"], found["steps"]) == (sum(line["documents"] for line in lines), len(lines))
    right = sum(min(right, count) for _, count, _, right in drawn)
    assert found["accuracy"] == right / found["documents"]
    assert found["grad_norm"] == lines[-1]["grad_norm"]
    assert whole.steps == 0


def test_the_line_of_one_step_is_its_own():
    sums, (line,) = StepSums(), lines_of([(2.5, 3, 0.5, 1)])
    sums.add(line)
    assert list(sums.take().items()) == list(line.items())


def test_nothing_finite_is_no_mean_of_training():
    averages = EpochAverages()
    averages.add({"documents": 3, "loss": None, "accuracy": 0.5})
    assert averages.take() == {}
