"""What a killed export of a checkpoint leaves, a whole model, is removed by the next one, and nothing else is."""

import dataclasses
import json
import os
import subprocess
import sys
import time

import pytest

from isotune.checkpoint.run_of_checkpoint import ABANDONED_SECONDS, run_of
from isotune.io.errors import UserError
from isotune.run.run_lease import Attempt

KILLED = """
import os, signal, sys
from pathlib import Path
from isotune.checkpoint import run_of_checkpoint

def killed(checkpoint, verify):
    (folder,) = Path(sys.argv[1]).iterdir()
    (folder / "model.safetensors").write_bytes(b"0" * 1000)
    os.kill(os.getpid(), signal.SIGKILL)

run_of_checkpoint.manifest_of = killed
with run_of_checkpoint.run_of(Path(sys.argv[1]) / "none", Path(sys.argv[1])):
    pass
"""


def export(beside) -> None:
    """One that begins, and ends because there is no such checkpoint."""
    with pytest.raises(UserError, match="there is no such folder"), run_of(beside / "step-00000001", beside):
        pass


def test_what_a_killed_export_left_is_removed_by_the_next(tmp_path):
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert [file.name for file in tmp_path.rglob("*.safetensors")] == ["model.safetensors"]
    export(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("owner", "age_seconds", "stays"),
    [
        ({}, 0.0, True),
        ({}, 2 * ABANDONED_SECONDS, True),
        ({"started": "1"}, 0.0, False),  # its number is another process's now
        ({"machine": "far away"}, 0.0, True),
        ({"machine": "far away"}, 2 * ABANDONED_SECONDS, False),
        (None, 2 * ABANDONED_SECONDS, True),  # of the user's own
    ],
)
def test_only_what_nobody_uses_is_removed(tmp_path, owner, age_seconds, stays):
    folder = tmp_path / ".checkpoint-abcd"
    folder.mkdir()
    if owner is not None:
        record = folder / "life.json"
        record.write_text(json.dumps(dataclasses.asdict(Attempt.current()) | owner))
        os.utime(record, (time.time() - age_seconds,) * 2)
    export(tmp_path)
    assert list(tmp_path.iterdir()) == ([folder] if stays else [])
