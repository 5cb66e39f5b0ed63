"""A notebook's two processes learn what its one process learns."""

import json
import sys
from pathlib import Path

import pytest
from tests.distributed.test_launches import free_port
from tests.launching import REPOSITORY, run_command

CELL = str(REPOSITORY / "tests" / "distributed" / "notebook_cell.py")


@pytest.mark.slow  # three fresh imports of the libraries
def test_notebook_launcher_on_two_processes_has_the_losses_of_one(tmp_path: Path):
    for processes in ("1", "2"):
        done = run_command([sys.executable, CELL, str(tmp_path), processes, str(free_port())], fresh=True)
        assert done.returncode == 0, done.stderr
    one, two = (json.loads((tmp_path / f"{processes}.json").read_text()) for processes in (1, 2))
    assert len(one) == 3
    assert two == pytest.approx(one, rel=1e-6)
