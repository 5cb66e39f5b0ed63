"""A loss that is no number stops all ranks with one sentence, or is left out by all of them, under any engine."""

from pathlib import Path

import pytest
import torch
from tests.distributed.engines import relative, saved
from tests.e2e.test_nonfinite import recipe
from tests.launching import TINY, start

ENGINES = [  # in short: DDP in tests/e2e/test_nonfinite.py
    pytest.param("zero2.yaml", marks=pytest.mark.slow),
    pytest.param("fsdp2.yaml", marks=pytest.mark.slow),
    pytest.param("zero3.yaml", marks=pytest.mark.slow),
]


def finite(lines: list[dict]) -> list[dict]:
    return [line for line in lines if line["loss"] is not None]


@pytest.mark.parametrize("config", ENGINES)
def test_it_is_skipped_by_every_rank_as_one_plain_process_skips_it(tmp_path: Path, config):
    values = {**TINY, **recipe(tmp_path, on_nonfinite="skip"), "save_strategy": "no"}
    one = start(tmp_path / "one", values)
    two = start(tmp_path / "two", values, processes=2, config=config)
    assert two.steps[-1]["skipped_steps"] == one.steps[-1]["skipped_steps"] == 1
    assert [x["loss"] is None for x in two.steps] == [x["loss"] is None for x in one.steps]
    assert [x["learning_rate"] for x in two.steps] == [x["learning_rate"] for x in one.steps]
    assert max(relative(finite(one.steps), finite(two.steps), "loss")) <= 1e-5
    for name, tensor in saved(one).items():
        close = torch.isclose(saved(two)[name], tensor, rtol=1e-3, atol=1e-5)
        assert (close | ~tensor.isfinite()).all(), name


@pytest.mark.slow
@pytest.mark.parametrize("config", ["zero2.yaml", "zero3.yaml", "fsdp2.yaml"])
def test_it_stops_every_rank_with_one_sentence(tmp_path: Path, config):
    done = start(tmp_path, {**TINY, **recipe(tmp_path), "save_strategy": "no"}, processes=2, config=config, expect=1)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "the loss of step " in errors[0] and "is not finite" in errors[0]
    assert not (done.run / "model").exists()


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp.yaml", "zero1.yaml", "zero2.yaml", "zero3.yaml", "fsdp2.yaml"])
def test_a_gradient_that_is_no_number_under_a_finite_loss_is_skipped_by_every_rank(tmp_path: Path, config):
    values = {**TINY, **recipe(tmp_path, value=0.0, on_nonfinite="skip"), "save_strategy": "no"}
    run = {"environment": {"PYTHONPATH": "."}, "script": "tests/distributed/overflow_backward.py"}
    one = start(tmp_path / "one", values, **run)
    two = start(tmp_path / "two", values, processes=2, config=config, **run)
    assert all(line["loss"] is not None for line in two.steps)
    assert two.steps[-1]["skipped_steps"] == one.steps[-1]["skipped_steps"] == 1
    assert [x["grad_norm"] is None for x in two.steps] == [x["grad_norm"] is None for x in one.steps]
    assert max(relative(one.steps, two.steps, "loss")) <= 1e-5
    for name, tensor in saved(one).items():
        assert torch.allclose(saved(two)[name], tensor, rtol=1e-3, atol=1e-5), name


@pytest.mark.slow
@pytest.mark.parametrize("config", ["zero2.yaml", "zero3.yaml", "fsdp2.yaml"])
def test_such_a_gradient_stops_every_rank_with_one_sentence(tmp_path: Path, config):
    values = {**TINY, **recipe(tmp_path, value=0.0), "save_strategy": "no"}
    run = {"environment": {"PYTHONPATH": "."}, "script": "tests/distributed/overflow_backward.py"}
    done = start(tmp_path, values, processes=2, config=config, expect=1, **run)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "the gradient of step " in errors[0] and "is not finite" in errors[0]


@pytest.mark.slow
@pytest.mark.parametrize("config", ["zero3.yaml", "fsdp2.yaml"])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_with_exact_gradients_both_are_skipped_and_the_rest_has_the_same_bits(tmp_path: Path, config, what):
    broken = recipe(tmp_path, **({} if what == "loss" else {"value": 0.0}), on_nonfinite="skip")
    values = {**TINY, **broken, "save_strategy": "no", "exact_gradients": True, "optim": "adamw_torch"}
    run = {"environment": {"PYTHONPATH": "."}}
    if what == "gradient":
        run["script"] = "tests/distributed/overflow_backward.py"
    one = start(tmp_path / "one", values, **run)
    two = start(tmp_path / "two", values, processes=2, config=config, **run)
    assert two.steps[-1]["skipped_steps"] == one.steps[-1]["skipped_steps"] == 1
    assert [(x["loss"], x["grad_norm"]) for x in two.steps] == [(x["loss"], x["grad_norm"]) for x in one.steps]
    for name, tensor in saved(one).items():
        assert torch.equal(saved(two)[name].nan_to_num(7.0), tensor.nan_to_num(7.0)), name
