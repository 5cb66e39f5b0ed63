"""The matrix of engines on CUDA devices over NCCL: as many processes as there are devices, up to two."""

from pathlib import Path

import pytest
import torch
from tests.distributed.engines import PLAIN, deviation, engine, recipes
from tests.launching import Finished, start_together

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

PROCESSES = min(2, torch.cuda.device_count())
NAMES = ("DDP on 2", "ZeRO-1 on 2", "ZeRO-2 on 2", "ZeRO-3 on 2", "FSDP2 on 2")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory):
    """One launch an engine, full and LoRA in each; (folder of the model, finished runs by name of the recipe)."""
    folder = tmp_path_factory.mktemp("engines")
    given = {name: recipe for name, recipe in recipes(folder).items() if name != "qlora"}
    done: dict[str, dict[str, Finished]] = {}

    def run(name: str) -> dict[str, Finished]:
        if name not in done:
            one = PLAIN if name == PLAIN.name else engine(name)
            launched = {"processes": PROCESSES, "config": one.config} if one is not PLAIN else {}
            done[name] = start_together(folder / name.replace(" ", "-"), given, **launched)
        return done[name]

    return folder / "opt", run


@pytest.mark.parametrize("tune", ["full", "lora"])
@pytest.mark.parametrize("name", NAMES)
def test_every_engine_gives_the_losses_and_norms_of_one_process(runs, name: str, tune: str):
    base, run = runs
    plain, other = run(PLAIN.name)[tune], run(name)[tune]
    assert other.environment["device"] == "cuda"
    assert other.environment["in_effect"]["kind"] == engine(name).kind
    apart = deviation(plain, other, Path(base))
    assert apart.loss <= 1e-5 and apart.early_norm <= 1e-5 and apart.eval_loss <= 1e-5


@pytest.mark.skipif(PROCESSES < 2, reason="shares need two CUDA devices")
def test_a_higher_stage_holds_less_on_each_device(runs):
    _, run = runs
    held = {name: run(name)["full"].environment["in_effect"] for name in ("DDP on 2", "ZeRO-2 on 2", "ZeRO-3 on 2")}
    numbers = [one["optimized_numbers_per_rank"] for one in held.values()]
    assert numbers[0] > numbers[1] >= numbers[2]
    assert held["ZeRO-3 on 2"]["parameter_bytes_per_rank"] < held["ZeRO-2 on 2"]["parameter_bytes_per_rank"]
