"""What is set before torch is imported."""

from pathlib import Path

import pytest

from isotune.commands import before_torch as module
from isotune.commands.before_torch import let_idle_threads_sleep


def test_idle_threads_sleep_without_a_gpu_unless_the_user_says_how_they_wait(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(module, "GPU_DRIVERS", (tmp_path / "none",))
    environment: dict[str, str] = {}
    let_idle_threads_sleep(environment)
    assert environment == {"GOMP_SPINCOUNT": "2000"}
    said = {"OMP_WAIT_POLICY": "ACTIVE"}
    let_idle_threads_sleep(said)
    assert said == {"OMP_WAIT_POLICY": "ACTIVE"}


def test_with_a_gpu_nothing_is_set(monkeypatch, tmp_path: Path):
    (tmp_path / "driver").touch()
    monkeypatch.setattr(module, "GPU_DRIVERS", (tmp_path / "driver",))
    environment: dict[str, str] = {}
    let_idle_threads_sleep(environment)
    assert environment == {}


@pytest.mark.parametrize(
    "script", ["sft", "classification", "arena", "trained/generate", "trained/evaluate_classifier"]
)
def test_every_command_that_imports_torch_does_so_first(script: str):
    source = Path(module.__file__).parent.joinpath(f"{script}.py").read_text()
    call = source.index("    before_torch(")
    assert not any(line.startswith(("import torch", "from torch")) for line in source.splitlines())
    assert "import" in source[call:]
