"""Where the runs of a sweep are: processes of this machine, several at once, or jobs of a cluster."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from contextlib import closing

import psutil
import pytest
from tests.launching import run_command

from isotune.commands import start
from isotune.commands.sweep.flags import JobOptions
from isotune.commands.sweep.jobs import FORGOTTEN, Jobs, end_of_job, last_verdict
from isotune.commands.sweep.processes import Command, Processes, shares_of
from isotune.io.errors import Preempted, RunFault, UserError

# what stands in the place of a run: it says when it began and ended and with which devices. It ends after so many
# seconds, or where it meets its partner (0 and 1, 2 and 3), or by a mistake; as a preempted run where it is told
RUN = """
import json, os, signal, sys, time
from pathlib import Path

def end(*_):
    Path(os.environ["ISOTUNE_VERDICT"]).write_text(json.dumps({"exit_status": 75, "message": "told to stop"}))
    (folder / "stopped").touch()
    os._exit(75)

folder = Path(sys.argv[-1].removeprefix("--output_dir="))
signal.signal(signal.SIGTERM, end)
signal.signal(signal.SIGINT, end)
folder.mkdir()
(folder / "began").touch()
began = time.time()
if sys.argv[1] == "wrong":
    Path(os.environ["ISOTUNE_VERDICT"]).write_text(json.dumps({"exit_status": 2, "message": "a mistake"}))
    sys.exit(2)
print("the output of", folder.name)
if sys.argv[1] == "meets":
    partner = folder.with_name(f"run-{int(folder.name[-1]) ^ 1}") / "began"
    while not partner.exists():
        time.sleep(0.02)
else:
    time.sleep(float(sys.argv[1]))
names = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
facts = {"began": began, "ended": time.time(), **{name: os.environ.get(name) for name in names}}
(folder / "facts.json").write_text(json.dumps(facts))
"""


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """A function that gives commands of these seconds each."""
    (tmp_path / "stand_in.py").write_text(RUN)
    monkeypatch.setattr(start, "PROGRAM", "stand_in")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)

    def made(*seconds: object) -> deque[Command]:
        folders = [tmp_path / f"run-{number}" for number in range(len(seconds))]
        logs = tmp_path / "logs"
        return deque(
            Command(folder, [str(one)], number, folder.name, logs / f"{folder.name}.log")
            for number, (folder, one) in enumerate(zip(folders, seconds, strict=True))
        )

    return made


class TestProcesses:
    """Several at once on this machine."""

    def test_two_are_at_work_at_once_each_with_its_devices_and_a_log(self, commands, tmp_path, monkeypatch):
        monkeypatch.setattr(start, "gpu_names", lambda *_: ["3", "4", "5", "6"])
        monkeypatch.setattr(os, "cpu_count", lambda: 12)
        shares = shares_of(2, [])
        ended = list(Processes(shares, []).run(commands(*["meets"] * 4)))
        assert [end for _, end in ended] == [start.Ended(0)] * 4
        facts = [json.loads((tmp_path / f"run-{n}/facts.json").read_text()) for n in range(4)]
        at_once = [sum(o["began"] <= one["began"] < o["ended"] for o in facts) for one in facts]
        assert max(at_once) <= 2  # and each has met another
        assert {one["CUDA_VISIBLE_DEVICES"] for one in facts[:2]} == {"3,4", "5,6"}
        assert {one["OMP_NUM_THREADS"] for one in facts} == {"3"}  # twelve cores, two runs of two processes
        assert (tmp_path / "logs/run-3.log").read_text() == "the output of run-3\n"

    def test_one_at_a_time_has_everything_and_the_terminal(self, commands, tmp_path, capfd):
        assert [end for _, end in Processes(shares_of(1, []), []).run(commands(0))] == [start.Ended(0)]
        facts = json.loads((tmp_path / "run-0/facts.json").read_text())
        assert facts["OMP_NUM_THREADS"] is None and facts["CUDA_VISIBLE_DEVICES"] is None
        assert "the output of run-0" in capfd.readouterr().out and not (tmp_path / "logs").exists()

    @pytest.mark.parametrize(
        ("gpus", "parallel", "launch", "says"),
        [
            (["0"], 2, [], "--parallel 2: 2 runs on 1 GPU each need 2, and there are 1"),
            (["0", "1", "2"], 2, ["--num_processes", "2"], "2 runs on 2 GPUs each need 4, and there are 3"),
        ],
    )
    def test_too_few_gpus_are_a_mistake(self, monkeypatch, gpus, parallel, launch, says):
        monkeypatch.setattr(start, "gpu_names", lambda *_: gpus)
        with pytest.raises(UserError, match=says):
            shares_of(parallel, launch)

    def test_gpus_that_cannot_be_shared_out_equally_are_left_over(self, monkeypatch):
        monkeypatch.setattr(start, "gpu_names", lambda *_: ["GPU-a", "GPU-b", "GPU-c"])
        shares = shares_of(2, [], {"OMP_NUM_THREADS": "5"})
        assert shares == [{"CUDA_VISIBLE_DEVICES": "GPU-a"}, {"CUDA_VISIBLE_DEVICES": "GPU-b"}]

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_a_signal_stops_all_that_run_and_begins_no_other(self, commands, tmp_path, number):
        def stop() -> None:
            while not all((tmp_path / f"run-{n}/began").exists() for n in (0, 1)):
                time.sleep(0.02)
            os.kill(os.getpid(), number)

        thread = threading.Thread(target=stop)
        thread.start()
        ended = []
        with pytest.raises(Preempted, match=f"stopped by {number.name}: the same sweep goes on"):
            ended.extend(end for _, end in Processes([{}, {}], []).run(commands(60, 60, 60)))
        thread.join()
        assert all((tmp_path / f"run-{n}/stopped").exists() for n in (0, 1)) and not (tmp_path / "run-2").exists()
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL

    def test_where_one_ends_the_sweep_the_others_are_stopped_and_waited_for(self, commands, tmp_path):
        queue = commands(60, "wrong", 60)
        with closing(Processes([{}, {}], []).run(queue)) as ends:
            command, ended = next(ends)
            while not (tmp_path / "run-0/began").exists():
                time.sleep(0.02)
        assert (command.trial, ended) == (1, start.Ended(2, "a mistake"))
        assert (tmp_path / "run-0/stopped").exists() and [one.trial for one in queue] == [2]

    def test_a_command_answers_with_status_and_sentence(self):
        code = (
            "from isotune.commands.start import Command; c = Command(['classify', 'nowhere.yaml']); c.process.wait();"
        )
        done = run_command([sys.executable, "-c", f"{code} print(c.poll())"], fresh=True)
        says = "Ended(exit_status=2, message='nowhere.yaml is no recipe, no run, and no data"
        assert done.stdout.strip().startswith(says), done.stderr

    @pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has ended")
    def test_what_a_killed_sweep_was_running_is_told_to_stop(self):
        code = "from isotune.commands import start; start.PROGRAM = 'http.server'; start.Command(['0']).process.wait()"
        sweep = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        end = time.monotonic() + 60
        while not (running := psutil.Process(sweep.pid).children()) or "http.server" not in running[0].cmdline():
            assert sweep.poll() is None and time.monotonic() < end
            time.sleep(0.05)
        sweep.kill()
        sweep.wait()
        assert not psutil.wait_procs(running, timeout=60)[1]


FINISHED = {"status": "finished", "exit_status": 0}
MEMORY = {"status": "failed", "exit_status": 2, "message": "too large", "reason": "memory"}
STOPPED = {"status": "preempted", "exit_status": 75, "message": "stopped after step 3"}
KILLED = {"status": "running", "exit_status": None, "message": None}


class TestJobs:
    """Jobs of a cluster; tests/slurm/test_slurm_sweep.py submits real ones."""

    @pytest.mark.parametrize(
        ("state", "verdict", "end"),
        [
            ("COMPLETED", FINISHED, start.Ended(0)),
            (FORGOTTEN, FINISHED, start.Ended(0)),
            ("FAILED", MEMORY, start.Ended(2, "too large", "memory")),
            ("CANCELLED", KILLED, start.Ended(75, "J is cancelled, and was not done")),
            ("CANCELLED", {}, start.Ended(75, "J is cancelled, and was not done")),
            ("FAILED", STOPPED, start.Ended(75, "J is failed, and was not done")),
            ("NODE_FAIL", KILLED, start.Ended(1)),
            ("OUT_OF_MEMORY", KILLED, start.Ended(1)),
            ("TIMEOUT", {}, start.Ended(1)),
            ("COMPLETED", KILLED, None),
            ("FAILED", KILLED, None),
            ("FAILED", {}, None),
            (FORGOTTEN, {}, None),
        ],
    )
    def test_how_a_job_ended_is_what_its_run_said_else_what_slurm_says(self, state, verdict, end):
        assert end_of_job(state, verdict, "J", "LOG") == end
        if end is None:  # another machine's file may come later, but not for ever
            never_began = state == "FAILED" and not verdict
            late = start.Ended(2, "J failed before it began: see LOG") if never_began else start.Ended(1)
            assert end_of_job(state, verdict, "J", "LOG", is_late=True) == late

    def test_the_last_attempt_counts(self, tmp_path):
        for attempt, status in ((2, "preempted"), (10, "finished")):
            (tmp_path / f"attempt-{attempt}-launch-1.json").write_text(json.dumps({"status": status}))
        assert last_verdict(tmp_path.iterdir()) == {"status": "finished"} and last_verdict([]) == {}

    def test_what_sbatch_says_is_one_sentence_and_nothing_counts_as_submitted(self, tmp_path, monkeypatch):
        refuses = tmp_path / "bin/sbatch"
        refuses.parent.mkdir()
        refuses.write_text(
            "#!/bin/sh\necho 'sbatch: error: Batch job submission failed:\n  Invalid partition' >&2\nexit 1\n"
        )
        refuses.chmod(0o755)
        monkeypatch.setenv("PATH", f"{refuses.parent}:{os.environ['PATH']}")
        command = Command(tmp_path / "trial-001/seed-42", ["classify", "--seed=42"], 1, "trial 1", tmp_path / "x.log")
        jobs = Jobs(tmp_path, tmp_path / "logs", JobOptions(["--partition=gpu"]))
        with pytest.raises(RunFault, match=r"failed: sbatch: error: Batch job submission failed: Invalid partition$"):
            list(jobs.run(deque([command])))
        assert list((tmp_path / "logs").iterdir()) == []

    def test_a_word_with_a_blank_is_refused_and_so_is_a_machine_without_slurm(self, tmp_path, monkeypatch):
        monkeypatch.setattr("isotune.commands.slurm.require_sbatch", lambda: None)
        command = Command(tmp_path / "trial-001/seed-42", ["classify", "--optim=a b"], 1, "trial 1", tmp_path / "x.log")
        jobs = Jobs(tmp_path, tmp_path / "logs", JobOptions([]))
        with pytest.raises(UserError, match="'--optim=a b' cannot be a word of a job's table"):
            list(jobs.run(deque([command])))
        monkeypatch.undo()
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(UserError, match=r"^sbatch is not found: run this on a login node of the cluster$"):
            Jobs(tmp_path, tmp_path / "logs", JobOptions([]))
