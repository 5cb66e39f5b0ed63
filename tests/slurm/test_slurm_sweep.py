"""`isotune sweep --slurm` ends as the sweep of a plain machine does, though its jobs are preempted and it is killed."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.launching import REPOSITORY, write_recipe
from tests.slurm.jobs import EXACT, PATIENCE_SECONDS, Site

SEARCH = ["--learning_rate", "1e-4..1e-2", "--trials", "2", "--seeds", "1", "--parallel", "2"]


def begin(cluster: Site, recipe: Path, folder: Path, *flags: str) -> "subprocess.Popen[str]":
    """The command of a sweep, in a user's shell."""
    words = ["-m", "isotune.cli", "sweep", str(recipe), *SEARCH, "--output_dir", str(folder), *flags]
    return subprocess.Popen(
        [sys.executable, *words],
        cwd=REPOSITORY, env=cluster.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def arrays(sweep: Path) -> list[Path]:
    """The tables of those that were submitted."""
    return sorted((sweep / "logs").glob("isotune-sweep-*.txt"))


@pytest.mark.slow
def test_a_sweep_by_jobs_that_are_preempted_while_it_is_dead_is_that_of_one_machine(cluster: Site, tmp_path):
    recipe = write_recipe(tmp_path, {**EXACT, "task": "classification", "max_steps": 150})
    plain, sweep = tmp_path / "plain", tmp_path / "sweep"
    of_plain = begin(cluster, recipe, plain)
    printed, _ = of_plain.communicate(timeout=PATIENCE_SECONDS)
    assert of_plain.returncode == 0, printed

    flags = ("--slurm", "--sbatch", "--gpus-per-node=1 --cpus-per-task=1")
    killed = begin(cluster, recipe, sweep, *flags)
    metrics = [sweep / f"trial-00{number}/seed-42/metrics.jsonl" for number in (1, 2)]
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not any(file.exists() for file in metrics):
        assert killed.poll() is None and time.monotonic() < deadline, killed.communicate()[0]
        time.sleep(0.1)
    killed.kill()
    killed.communicate()
    before = arrays(sweep)
    cluster.ask("sbatch", "--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")

    again = begin(cluster, recipe, sweep, *flags)
    printed, _ = again.communicate(timeout=2 * PATIENCE_SECONDS)
    assert again.returncode == 0, printed
    assert printed.count("submitted before") == 2, printed
    later = [file.read_text().split()[0] for file in arrays(sweep) if file not in before]
    assert all(name.endswith("/eval/sweep_test") for name in later), later
    logs = "".join(file.read_text() for file in (sweep / "logs").glob("isotune-sweep-*.log"))
    assert logs.count("it stopped for a preemption or the time limit: requeued") == 2, logs
    found, other = (json.loads((folder / "sweep.json").read_text()) for folder in (plain, sweep))
    assert found["trials"] == other["trials"] and found["winner"] == other["winner"]
    assert found["examined"] == other["examined"]


@pytest.mark.slow
def test_ctrl_c_leaves_the_jobs_and_what_slurm_refuses_is_one_sentence(cluster: Site, tmp_path):
    recipe = write_recipe(tmp_path, {**EXACT, "task": "classification"})
    refused = begin(cluster, recipe, tmp_path / "refused", "--slurm", "--sbatch", "--partition nowhere")
    printed, _ = refused.communicate(timeout=120)
    assert refused.returncode == 1 and "Traceback" not in printed
    assert "failed: sbatch: error: invalid partition specified: nowhere" in printed.splitlines()[-1]

    options = "--gpus-per-node=1 --cpus-per-task=1 --hold"
    stopped = begin(cluster, recipe, tmp_path / "sweep", "--slurm", "--sbatch", options)
    deadline = time.monotonic() + 120
    while not (queue := cluster.ask("squeue", "--noheader", "--format=%j")):
        assert stopped.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(1)  # sbatch has answered, and it waits
    stopped.terminate()
    printed, _ = stopped.communicate(timeout=60)
    assert stopped.returncode == 75, printed
    assert f"the jobs go on, and the same sweep waits for them (`scancel --name={queue.strip()}` ends them)" in printed
    assert cluster.ask("squeue", "--noheader", "--format=%j") == queue
    cluster.ask("scancel", f"--name={queue.strip()}")
