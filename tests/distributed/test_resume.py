"""A run that goes on from a checkpoint ends as the one that never stopped, whatever engine and number of ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tests.building import small_opt
from tests.launching import TINY, Finished, start, start_together

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


ENGINES = {"ddp.yaml": 2, "zero1.yaml": 2, "zero2.yaml": 2, "zero3.yaml": 2, "fsdp2.yaml": 2, "single.yaml": 1}
WHOLE_CHAIN = [("zero2.yaml", 1), ("zero3.yaml", 2), ("fsdp2.yaml", 3), ("single.yaml", 4)]
CHAIN = [("zero3.yaml", 2), ("fsdp2.yaml", 4)]


def go_on(folder: Path, recipe: dict[str, Any], config: str, before: Finished, step: int, **more: Any) -> Finished:
    """A run of its own that goes on from another one's checkpoint under the engine of `config`."""
    processes = more.pop("processes", ENGINES[config])
    after = start(folder, recipe, "--resume", checkpoint(before, step), processes=processes, config=config)
    assert f"resumed     after step {step}" in after.stdout, config
    return after


@pytest.mark.parametrize("chain", [CHAIN, pytest.param(WHOLE_CHAIN, marks=pytest.mark.slow)], ids=len)
def test_every_engine_reads_the_checkpoint_of_the_one_before_it(ddp, tmp_path, chain):
    before = ddp
    for config, step in chain:
        before = go_on(tmp_path / config, EVERY_STEP, config, before, step)
        assert_same_figures(before, ddp)


@pytest.mark.parametrize(("many", "few"), [(2, 1), pytest.param(3, 2, marks=pytest.mark.slow)])
def test_exact_gradients_on_many_processes_gone_on_with_on_fewer_is_one_run(tmp_path, many, few):
    recipe = EVERY_STEP | {"tune": "lora", "lora_dropout": 0.1, "bf16": False, "exact_gradients": True}
    whole = start(tmp_path / "many", recipe, processes=many)
    config = "single.yaml" if few == 1 else "ddp.yaml"
    assert_same_run(go_on(tmp_path / "few", recipe, config, whole, 3, processes=few), whole)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["fsdp2.yaml", "zero3.yaml"])
def test_exact_gradients_that_an_engine_shards_over_three_processes_go_on_over_two(tmp_path, config):
    recipe = EVERY_STEP | {"bf16": False, "exact_gradients": True, "optim": "adamw_torch"}
    three = start(tmp_path / "three", recipe, processes=3, config=config)
    assert_same_run(go_on(tmp_path / "two", recipe, config, three, 3), three)


@pytest.mark.slow
@pytest.mark.parametrize("tune", ["full", "lora"])
def test_every_engine_reads_the_checkpoint_of_every_engine(tmp_path, tune):
    recipe = EVERY_STEP | {"tune": tune, "exact_gradients": False}
    runs = {config: start(tmp_path / config, recipe, processes=n, config=config) for config, n in ENGINES.items()}
    going_on = {writer: recipe | {"resume": checkpoint(run, 3)} for writer, run in runs.items()}
    for reader, processes in ENGINES.items():
        read = start_together(tmp_path / f"read-by-{reader}", going_on, processes=processes, config=reader)
        for after in read.values():
            assert after.stdout.count("resumed     after step 3") == len(ENGINES)
            assert_same_figures(after, runs["single.yaml"])


@pytest.mark.slow
@pytest.mark.parametrize("config", ["zero1.yaml", "zero2.yaml", "zero3.yaml", "fsdp2.yaml"])
def test_the_same_engine_and_world_size_goes_on_with_the_same_bits(tmp_path, config):
    whole = start(tmp_path / "whole", EVERY_STEP, processes=2, config=config)
    assert_same_run(go_on(tmp_path / "again", EVERY_STEP, config, whole, 3), whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "precision"),
    [
        ("zero2.yaml", "bf16"),
        ("zero3.yaml", "bf16"),
        pytest.param(
            "zero2.yaml",
            "fp16",
            marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="fp16 under DeepSpeed needs a GPU"),
        ),
    ],
)
def test_master_weights_and_the_loss_scale_survive_under_16_bit_engines(tmp_path, config, precision):
    recipe = EVERY_STEP | {precision: True}
    whole = start(tmp_path / "whole", recipe, processes=2, config=config)
    assert_same_run(go_on(tmp_path / "again", recipe, config, whole, 3), whole)


@pytest.mark.slow
def test_more_ranks_and_fewer_read_the_same_checkpoint(tmp_path, ddp):
    for config, processes in (("zero2.yaml", 3), ("zero3.yaml", 4), ("fsdp2.yaml", 3), ("ddp.yaml", 4)):
        after = go_on(tmp_path / f"{config}-{processes}", EVERY_STEP, config, ddp, 2, processes=processes)
        assert_same_figures(after, ddp)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp.yaml", "zero2.yaml"])
def test_adapters_on_four_bit_weights_go_on_with_the_same_bits(tmp_path, config):
    recipe = EVERY_STEP | {"tune": "qlora", "lora_dropout": 0.1, "model_name_or_path": small_opt(tmp_path / "opt")}
    whole = start(tmp_path / "whole", recipe, processes=2, config=config)
    assert_same_run(go_on(tmp_path / "again", recipe, config, whole, 3), whole)


@pytest.mark.slow
@pytest.mark.parametrize("optim", ["adafactor", "adamw_8bit", "lion_32bit"])
def test_other_optimizers_go_on_with_the_same_bits_or_say_that_they_cannot(tmp_path, optim):
    recipe = EVERY_STEP | {"optim": optim}
    whole = start(tmp_path / "whole", recipe, processes=2, expect=None)
    if whole.status:
        errors = [line for line in whole.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and "optim" in errors[0], whole.stderr
        return
    assert_same_run(go_on(tmp_path / "again", recipe, "ddp.yaml", whole, 3), whole)
