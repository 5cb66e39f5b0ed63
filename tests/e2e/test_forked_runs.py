"""A run by a fork of a loaded process, which most tests use, is the run of an interpreter of its own."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.forking import start_forked
from tests.launching import TINY, Finished, run_command, start, surroundings_of

LORA = {**TINY, "tune": "lora", "lora_dropout": 0.1, "learning_rate": 1e-2, "exact_gradients": False}
TIMED = ("step_seconds", "tokens_per_second", "peak_memory_bytes")


def result(done: Finished) -> tuple:
    """What a run computed, printed and recorded, without what a clock says and without its own path."""
    lines = [{key: value for key, value in line.items() if key not in TIMED} for line in done.lines]
    weights = [(file.name, file.read_bytes()) for file in sorted(done.run.glob("model/*.safetensors"))]
    recorded = {key: value for key, value in done.environment.items() if key in ("in_effect", "heap_settings")}
    assert lines and weights and recorded["in_effect"]
    printed = [line.replace(str(done.run.parent), "FOLDER") for line in done.stdout.splitlines()]
    # DeepSpeed warns while the launcher imports it, and a fork has nothing to load
    loading = ("Setting accelerator to CPU", "loading     torch")
    return lines, weights, recorded, [line for line in printed if not any(words in line for words in loading)]


def both(folder: Path, **launch: Any) -> tuple[Finished, Finished]:
    """The run by a fork and by a fresh interpreter; each prepares its data itself."""
    caches = [{"ISOTUNE_CACHE": str(folder / f"cache-{name}")} for name in ("forked", "fresh")]
    forked = start(folder / "forked", LORA, environment=caches[0], **launch)
    return forked, start(folder / "fresh", LORA, environment=caches[1], fresh=True, **launch)


def without_rates(progress: str) -> str:
    return re.sub(r"\[.*?\]", "", progress)


@pytest.mark.slow
def test_one_process_computes_prints_and_records_the_same(tmp_path: Path):
    forked, fresh = both(tmp_path)
    assert result(forked) == result(fresh)
    assert without_rates(forked.stderr) == without_rates(fresh.stderr)


@pytest.mark.slow
def test_a_launch_of_two_ranks_computes_prints_and_records_the_same(tmp_path: Path):
    forked, fresh = both(tmp_path, processes=2, config="zero2.yaml")
    assert forked.environment["in_effect"]["kind"] == "DeepSpeed"
    assert result(forked) == result(fresh)


SHOW = """
import json, os, signal, sys
from pathlib import Path
from typing import Any
shown = {"name": __name__, "file": __file__, "argv": sys.argv, "path": sys.path[0], "cwd": os.getcwd()}
shown |= {"variable": os.environ["ISOTUNE_SHOWN"], "home": os.environ.get("HOME"), "stdin": sys.stdin.read()}
shown |= {"TERM": str(signal.getsignal(signal.SIGTERM)), "INT": str(signal.getsignal(signal.SIGINT))}
words = Path("/proc/self/cmdline").read_bytes().split(b"\\0")
variables = Path("/proc/self/environ").read_bytes().split(b"\\0")
shown |= {"command": [word.decode() for word in words if word], "in_proc": b"ISOTUNE_SHOWN=here" in variables}
print(json.dumps(shown))
"""


def test_a_script_finds_the_command_line_variables_and_streams_that_it_was_given(tmp_path: Path):
    script = tmp_path / "show.py"
    script.write_text(SHOW)
    command = [sys.executable, str(script), "--a", "b c", ""]
    forked, fresh = (
        run_command(command, {"ISOTUNE_SHOWN": "here"}, fresh=fresh, cwd=tmp_path, text="typed 🙂")
        for fresh in (False, True)
    )
    assert (forked.returncode, forked.stderr) == (0, "")
    assert json.loads(forked.stdout) == json.loads(fresh.stdout)
    assert json.loads(forked.stdout)["stdin"] == "typed 🙂"


@pytest.mark.parametrize(
    ("ending", "status", "said"),
    [
        ("sys.exit(75)", 75, ""),
        ("sys.exit()", 0, ""),
        ("sys.exit('a sentence')", 1, "a sentence\n"),
        ("raise ValueError('wrong')", 1, "ValueError: wrong\n"),
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, ""),
        ("os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM, ""),
        ("atexit.register(print, 'at exit', file=sys.stderr)", 0, "at exit\n"),
        ("threading.Thread(target=print, args=('a thread',), kwargs={'file': sys.stderr}).start()", 0, "a thread\n"),
    ],
)
def test_a_script_ends_with_its_own_status(tmp_path: Path, ending, status, said):
    script = tmp_path / "end.py"
    script.write_text(f"import atexit, os, signal, sys, threading\nprint('printed')\nsys.stdout.flush()\n{ending}\n")
    done = run_command([sys.executable, str(script)])
    assert (done.returncode, done.stdout) == (status, "printed\n")
    assert done.stderr.endswith(said) and bool(done.stderr) == bool(said)


def test_a_command_that_takes_too_long_is_ended_with_what_it_started(tmp_path: Path):
    child = tmp_path / "child.py"
    child.write_text("import time\ntime.sleep(300)")
    script = tmp_path / "parent.py"
    script.write_text(
        "import subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, {str(child)!r}])\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))\n"
        "child.wait()\n"
    )
    process = start_forked([sys.executable, str(script)], surroundings_of(), tmp_path)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(2)
    process.kill_group()
    assert process.wait(10) == -signal.SIGKILL
    with pytest.raises(ProcessLookupError):
        for _ in range(500):
            os.kill(int((tmp_path / "pid").read_text()), 0)
            signal.sigtimedwait([], 0.01)
