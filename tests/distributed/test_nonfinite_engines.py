"""A loss that is no number stops all ranks with one sentence, or is left out by all of them, under any engine."""

from pathlib import Path

import pytest
import torch
from tests.distributed.engines import relative, saved
from tests.e2e.test_nonfinite import recipe
from tests.launching import TINY, start

ENGINES = [
    pytest.param("zero2.yaml"),
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
