"""`from isotune import Trainer, SFTTrainer`: the same losses and predictions on every engine and split of a batch."""

import functools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.launching import launcher, run_command
from tests.numerics.test_drop_in import bert
from transformers import AutoModelForSequenceClassification

SCRIPT = "tests/distributed/drop_in_matrix.py"
SFT = ("packed", "padded", "chat", "messages", "text", "lora")
KINDS = (*SFT, "classes", "pairs", "regression", "own loss")
IN_SHORT = ("packed", "lora", "own loss")  # the last of a classifier
ROUNDING = 1e-6  # relative, of losses in fp32; predictions after three updates 1e-5


def run(
    folder: Path,
    split: tuple[int, int],
    *,
    processes: int = 0,
    config: str = "ddp.yaml",
    kinds: Sequence[str] = KINDS,
    which: str = "isotune",
) -> dict[str, Any]:
    file = folder / f"{which}-{config}-{processes}-{split[0]}.json"
    start = launcher(config, processes) if processes else [sys.executable]
    done = run_command([*start, SCRIPT, str(file), which, *map(str, split), *kinds], {"PYTHONPATH": "."})
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    found = json.loads(file.read_text())
    assert list(found) == list(kinds)
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Sequence[str]], dict[str, Any]]:
    """The kinds on one process with the whole batch at once."""
    return functools.cache(lambda kinds: run(tmp_path_factory.mktemp("alone"), (8, 1), kinds=kinds))


def assert_same(found: dict[str, Any], alone: dict[str, Any], *, bits: bool) -> None:
    for kind, one in found.items():
        expected = alone[kind]
        if bits and one["exact"]:
            assert one == expected, kind
            continue
        assert one["losses"] == pytest.approx(expected["losses"], rel=ROUNDING), kind
        assert one["norms"] == pytest.approx(expected["norms"], rel=1e-5), kind
        assert one["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5), kind
        for row, other in zip(one["predictions"], expected["predictions"], strict=True):
            assert row == pytest.approx(other, abs=1e-4), kind


@pytest.mark.parametrize(
    ("split", "kinds"),
    [((4, 1), IN_SHORT), *(pytest.param(split, KINDS, marks=pytest.mark.slow) for split in ((4, 1), (1, 4)))],
)
def test_two_ddp_processes_train_and_evaluate_as_one(split: tuple[int, int], kinds: Sequence[str], alone, tmp_path):
    found = run(tmp_path, split, processes=2, kinds=kinds)
    assert found["lora"]["exact"]
    assert_same(found, alone(kinds), bits=True)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["zero2.yaml", "fsdp2.yaml"])
@pytest.mark.parametrize("split", [(4, 1), (2, 2)])
def test_two_processes_of_an_engine_that_shards_train_and_evaluate_as_one(
    config: str, split: tuple[int, int], alone, tmp_path
):
    assert_same(run(tmp_path, split, processes=2, config=config), alone(KINDS), bits=False)


@pytest.mark.slow
def test_one_process_trains_and_evaluates_the_same_in_small_parts(alone, tmp_path):
    assert_same(run(tmp_path, (2, 4)), alone(KINDS), bits=True)


@pytest.mark.parametrize(
    ("config", "precision"),
    [("fsdp2.yaml", []), *(pytest.param(f"zero{n}.yaml", ["bf16"], marks=pytest.mark.slow) for n in (2, 3))],
)
def test_a_model_that_is_partly_frozen_is_saved_whole_under_an_engine_that_shards(config, precision, tmp_path):
    words = [*launcher(config, 2), "tests/distributed/frozen_layers.py", str(tmp_path), *precision]
    done = run_command(words, {"PYTHONPATH": "."})
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    saved, begun = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model"), bert()
    frozen = ("bert.embeddings.", "bert.encoder.layer.0.")
    for (name, tensor), start in zip(saved.named_parameters(), begun.parameters(), strict=True):
        given = start.bfloat16().float() if precision else start  # of which the engine itself keeps a rounded copy
        assert tensor.dtype == torch.float32 and tensor.equal(given) == name.startswith(frozen), name
        assert (tensor - start).abs().max() < 0.1, name  # three updates of 1e-2 each


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The library's trainers on one process, with all rows of the data in one batch: where they are right."""
    return run(tmp_path_factory.mktemp("stock"), (8, 1), which="stock")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "config", "split"),
    [(0, "ddp.yaml", (2, 4)), (2, "ddp.yaml", (2, 2)), (2, "zero2.yaml", (4, 1)), (2, "fsdp2.yaml", (1, 4))],
)
def test_every_launch_has_the_losses_of_the_library_on_one_process(
    processes: int, config: str, split: tuple[int, int], stock: dict[str, Any], tmp_path
):
    found = run(tmp_path, split, processes=processes, config=config, which="few")
    for kind, one in found.items():
        assert one["losses"] == pytest.approx(stock[kind]["losses"], rel=1e-5), kind
        assert one["eval_loss"] == pytest.approx(stock[kind]["eval_loss"], rel=1e-4), kind
        for row, other in zip(one["predictions"], stock[kind]["predictions"], strict=True):
            assert row == pytest.approx(other, abs=1e-4), kind


@pytest.mark.slow
def test_the_library_itself_has_other_losses_in_parts(stock: dict[str, Any], tmp_path):
    """It adds up the means of a classifier's four parts, and class weights are divided by their sum in each."""
    parts = run(tmp_path, (2, 4), which="stock", kinds=["own loss", "classes"])
    first, whole = ({kind: found[kind]["losses"][0] for kind in parts} for found in (parts, stock))
    assert first["classes"] == pytest.approx(4 * whole["classes"], rel=1e-5)
    assert first["own loss"] != pytest.approx(4 * whole["own loss"], rel=1e-4)
    assert parts["classes"]["norms"][0] == pytest.approx(4 * stock["classes"]["norms"][0], rel=1e-4)
