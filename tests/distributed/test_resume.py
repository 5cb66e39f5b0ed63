"""A run that goes on from a checkpoint ends as the one that never stopped, whatever engine and number of ranks."""

from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from tests.launching import TINY, Finished, start

TIMED = {"step_seconds", "tokens_per_second", "peak_memory_bytes", "eval_seconds"}
STEPS = 6
EVERY_STEP = TINY | {"save_steps": 1, "save_total_limit": 100, "max_steps": STEPS}
EVERY_STEP |= {"eval_dataset_name": "builtin:greetings", "eval_steps": 2}


def figures(finished: Finished) -> list[dict[str, Any]]:
    """Every line of metrics.jsonl without what a clock says."""
    return [{key: value for key, value in line.items() if key not in TIMED} for line in finished.lines]


def weights(finished: Finished) -> dict[str, bytes]:
    """The final tensors, as bytes."""
    found = {}
    for file in finished.run.glob("model/*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            found |= {name: tensors.get_tensor(name).numpy().tobytes() for name in tensors.keys()}  # noqa: SIM118
    return found


def checkpoint(finished: Finished, step: int) -> str:
    """The folder of a step's checkpoint."""
    return str(finished.run / "checkpoints" / f"step-{step:08d}")


def assert_same_run(resumed: Finished, whole: Finished) -> None:
    """Bitwise: every line and every weight."""
    assert figures(resumed) == figures(whole)
    assert weights(resumed) == weights(whole)


def assert_same_figures(resumed: Finished, whole: Finished) -> None:
    """To rounding: the loss of every step."""
    assert [line["step"] for line in resumed.steps] == [line["step"] for line in whole.steps]
    for one, other in zip(resumed.steps, whole.steps, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["learning_rate"] == other["learning_rate"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def ddp(folder) -> Finished:
    """Two processes that never stop, with an evaluation in between, and a checkpoint of each step."""
    return start(folder / "ddp", EVERY_STEP, processes=2)


def test_the_same_number_of_processes_goes_on_with_the_same_bits(ddp, folder):
    resumed = start(
        folder / "ddp-again",
        EVERY_STEP,
        "--resume",
        checkpoint(ddp, 3),
        processes=2,
    )
    assert "resumed     after step 3" in resumed.stdout
    assert_same_run(resumed, ddp)


CHAIN = [("zero2.yaml", 1), ("zero3.yaml", 2), ("fsdp2.yaml", 3), ("single.yaml", 4)]


def test_every_engine_reads_the_checkpoint_of_every_other(ddp, folder):
    before = ddp
    for config, step in CHAIN:
        after = start(
            folder / config,
            EVERY_STEP,
            "--resume",
            checkpoint(before, step),
            processes=1 if config == "single.yaml" else 2,
            config=config,
        )
        assert f"resumed     after step {step}" in after.stdout, config
        assert_same_figures(after, ddp)
        before = after
