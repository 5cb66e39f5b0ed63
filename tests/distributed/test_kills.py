"""SIGKILL at any moment costs nothing but time: the run ends with the bits of the one that was never killed."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.building import small_opt
from tests.launching import TINY, Finished, run_command

from isotune.checkpoint.store import CheckpointStore

TIMED = {"step_seconds", "tokens_per_second", "peak_memory_bytes"}


def run_with_kills(folder: Path, recipe: dict[str, Any], kills: int, seed: int) -> tuple[Finished, dict[str, int]]:
    """The run, and what its killer counted."""
    folder.mkdir(parents=True)
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe | {"output_dir": str(folder / "run")}))
    command = ["tests/distributed/killing.py", str(file), str(folder / "run"), str(kills), str(seed)]
    quiet = {"TOKENIZERS_PARALLELISM": "false"}
    done = run_command([sys.executable, *command], quiet, timeout_seconds=200 + 5 * kills)
    assert done.returncode == 0, done.stdout + done.stderr
    return Finished(0, done.stdout, done.stderr, folder / "run"), json.loads(done.stdout.splitlines()[-1])


def figures(finished: Finished) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key not in TIMED} for line in finished.lines]


@pytest.mark.parametrize(
    ("kills", "steps"), [pytest.param(3, 20, id="3"), pytest.param(110, 400, id="110", marks=pytest.mark.slow)]
)
def test_a_run_that_is_killed_again_and_again_ends_with_the_bits_of_one_that_is_not(tmp_path, kills, steps):
    recipe = TINY | {
        "model_name_or_path": small_opt(tmp_path / "model", dropout=0.1),
        "max_seq_length": 64,
        "global_batch_size": 3,
        "max_steps": steps,
        "save_steps": 1,
    }
    whole, _ = run_with_kills(tmp_path / "whole", recipe | {"save_steps": 1000}, 0, seed=0)
    killed, seen = run_with_kills(tmp_path / "killed", recipe, kills, seed=kills)
    print(seen)
    assert seen["kills"] == kills
    assert seen["lives"] == kills + 1
    assert seen["in_a_write"] > kills // 20
    assert figures(killed) == figures(whole)
    assert [line["step"] for line in killed.steps] == list(range(1, steps + 1))
    (one,), (other,) = (list(run.run.glob("model/*.safetensors")) for run in (killed, whole))
    assert one.read_bytes() == other.read_bytes()
    left = CheckpointStore(killed.run / "checkpoints")
    assert left.newest_valid().manifest.step == steps
    assert not list(left.path.glob(".*"))
