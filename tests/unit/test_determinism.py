"""Deterministic kernels: asked for on CUDA only, and an operator that has none is named."""

import os

import pytest
import torch

from isotune.io.errors import RunFault
from isotune.models.cuda.determinism import WORKSPACE, explained, use_deterministic_kernels


@pytest.fixture
def restored():
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


def test_on_a_cpu_nothing_is_changed(monkeypatch, capsys):
    monkeypatch.delenv(WORKSPACE, raising=False)
    use_deterministic_kernels(torch.device("cpu"), promised_by="resume", is_main=True)
    assert not torch.are_deterministic_algorithms_enabled() and not capsys.readouterr().out


def test_a_workspace_that_the_user_chose_stays(monkeypatch, capsys, restored):
    monkeypatch.setenv(WORKSPACE, ":16:8")
    use_deterministic_kernels(torch.device("cuda"), promised_by="resume", is_main=False)
    assert torch.are_deterministic_algorithms_enabled() and os.environ[WORKSPACE] == ":16:8"
    assert not torch.utils.deterministic.fill_uninitialized_memory and not capsys.readouterr().out


def test_an_operator_without_a_deterministic_kernel_is_named(restored):
    torch.use_deterministic_algorithms(True)
    expected = r"^put_ has no deterministic kernel .* exact_gradients: false and resume: never"
    with pytest.raises(RunFault, match=expected), explained():  # torch's own complaint
        torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))


def test_other_errors_stay_as_they_are():
    with pytest.raises(RuntimeError, match=r"^something else$") as raised, explained():
        raise RuntimeError("something else")
    assert type(raised.value) is RuntimeError
