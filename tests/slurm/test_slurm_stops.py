"""A job that is stopped, moved, cut off or broken loses nothing, changes nothing, and ends when it should."""

import json
import re
from pathlib import Path

import pytest
from tests.launching import Finished, start, write_recipe
from tests.slurm.jobs import EXACT, Job, Site, bits, verdicts

from isotune.checkpoint.manifest import verify

pytestmark = pytest.mark.slow
YELP = "slurm/yelp.sbatch"


def submit(cluster: Site, folder: Path, recipe: dict, **more) -> Job:
    return cluster.submit(folder, YELP, "--config", str(write_recipe(folder, recipe)), **more)


def push_out(cluster: Site) -> str:
    """An urgent job takes all nodes, and goes at once; its number."""
    command = ["sbatch", "--parsable", "--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null"]
    return cluster.ask(*command, "--wrap=true").strip()


def nodes_of(job: Job, life: int) -> list[str]:
    """Where a life of the job began, by the files that its nodes write."""
    files = job.lives[0].parent.glob(f"attempt-{life}-node*.log")
    return sorted(file.stem.rpartition("-")[2] for file in files)


def checkpointed(job: Job) -> int:
    """The step of the newest checkpoint, which is whole."""
    return verify(max((job.run / "checkpoints").iterdir())).step


def test_a_job_whose_time_is_nearly_up_checkpoints_is_requeued_and_loses_nothing(cluster, plain, tmp_path):
    job = submit(cluster, tmp_path, EXACT, options=("--time=3", "--signal=B:USR1@60"))
    job.wait_for_step(3)
    ranks = job.freeze()
    job.wait_for("signal", lambda: "told to stop" in job.text)
    for rank in ranks:
        rank.resume()
    done = job.wait()
    assert done.status == 0, done.stdout
    assert [one["status"] for one in verdicts(job)] == ["preempted", "finished"]
    assert bits(done.run) == bits(plain.run)


def test_a_user_can_ask_for_a_checkpoint_and_a_new_life(cluster, plain, tmp_path):
    job = submit(cluster, tmp_path, EXACT)
    job.wait_for_step(3)
    cluster.ask("scancel", "--signal=USR1", "--batch", job.number)
    done = job.wait()
    assert done.status == 0, done.stdout
    assert [one["status"] for one in verdicts(job)] == ["preempted", "finished"]
    assert "Traceback" not in done.stdout
    assert bits(done.run) == bits(plain.run)


def test_twenty_preemptions_in_a_row_change_no_bit(cluster, tmp_path):
    recipe = EXACT | {"max_steps": 600}
    plain = start(tmp_path / "plain", recipe, script="train/yelp.py")
    job = submit(cluster, tmp_path, recipe)
    for life in range(20):
        job.wait_for("training", lambda life=life: is_training(job, life))
        job.freeze()  # Slurm sends CONT before TERM, so that each life has steps left for the next one
        push_out(cluster)
        job.wait_for("next life", lambda life=life: f"attempt {life + 1}:" in job.text)
    done = job.wait()
    assert done.status == 0, done.stdout
    assert [one["status"] for one in verdicts(job)] == ["preempted"] * 20 + ["finished"]
    assert bits(done.run) == bits(plain.run)


def is_training(job: Job, life: int) -> bool:
    """Whether that life has said its plan and taken a step since."""
    text = job.text.partition(f"attempt {life}:")[2]
    status = json.loads((job.run / "status.json").read_text()) if (job.run / "status.json").exists() else {}
    lines = (job.run / "metrics.jsonl").read_text().count("\n") if (job.run / "metrics.jsonl").exists() else 0
    return "plan  " in text and lines > status.get("step", 0)


def test_a_node_that_dies_in_mid_step_costs_only_the_steps_since_the_last_checkpoint(cluster, plain, tmp_path):
    job = submit(cluster, tmp_path, EXACT | {"save_steps": 10}, nodes=2)
    job.wait_for_step(15)
    second = nodes_of(job, 0)[1]
    cluster.cluster.kill(second)
    try:
        job.wait_for("next life", lambda: len(job.lives) > 1)
        done = job.wait()
    finally:
        cluster.cluster.boot(second)
    assert done.status == 0, done.stdout
    assert re.search(r"resumed     after step [1-5]0, from ", done.stdout), done.stdout
    assert bits(done.run) == bits(plain.run)


def test_a_node_whose_ranks_die_before_slurm_notices_is_no_fault_of_the_program(cluster, plain, tmp_path):
    job = submit(cluster, tmp_path, EXACT | {"save_steps": 10}, nodes=2)
    job.wait_for_step(15)
    second = nodes_of(job, 0)[1]
    cluster.cluster.kill(second, silently=False)  # the other node's ranks are told by the network, and fail at once
    try:
        job.wait_for("next life", lambda: len(job.lives) > 1)
        done = job.wait()
    finally:
        cluster.cluster.boot(second)
    assert done.status == 0, done.stdout
    assert bits(done.run) == bits(plain.run)


def test_a_life_on_a_node_that_was_cut_off_writes_nothing_after_the_next_one_began(cluster, plain, tmp_path):
    job = submit(cluster, tmp_path, EXACT, options=("--exclude=node3",))
    job.wait_for_step(3)
    (first,) = nodes_of(job, 0)
    cluster.cluster.cut(first)
    ranks = job.freeze()  # or they might be done before Slurm has noticed anything
    try:
        job.wait_for("next life's training", lambda: is_training(job, 1))
        for rank in ranks:
            rank.resume()
        # the first life ends by itself, though nobody can reach it
        job.wait_for("the first life's end", lambda: verdicts(job)[0]["status"] == "superseded", 60)
    finally:
        cluster.cluster.heal(first)
    done = job.wait(1500)
    assert done.status == 0, done.stdout
    (log,) = job.lives[0].parent.glob("attempt-0-*.log")
    assert "was taken over by process" in log.read_text()
    assert [one["status"] for one in verdicts(job)] == ["superseded", "finished"]
    assert bits(done.run) == bits(plain.run)


def test_a_cancelled_job_leaves_a_checkpoint_and_stays_cancelled(cluster, plain, tmp_path):
    job = submit(cluster, tmp_path, EXACT, nodes=2)
    job.wait_for_step(3)
    cluster.ask("scancel", job.number)
    done = job.wait()
    assert done.stderr == "CANCELLED" and job.facts()["Restarts"] == "0"
    assert [one["status"] for one in verdicts(job)] == ["preempted"]
    assert checkpointed(job) == verdicts(job)[0]["step"]

    again = submit(cluster, tmp_path, EXACT, nodes=1)  # on fewer nodes than before
    done = again.wait()
    assert done.status == 0 and "resumed     after step" in done.stdout
    assert bits(done.run) == bits(plain.run)


def test_a_fault_ends_the_job_once(cluster, tmp_path):
    job = submit(cluster, tmp_path, EXACT)
    job.wait_for_step(3)
    job.ranks[1].kill()
    done = job.wait()
    assert (done.status, done.stderr, job.facts()["Restarts"]) == (1, "FAILED", "0"), done.stdout
    assert "not requeued" in done.stdout


def test_ranks_that_talk_through_the_wrong_interface_say_which_node_and_which_address(cluster, tmp_path):
    wrong = {"GLOO_SOCKET_IFNAME": "lo", "MEETING_SECONDS": "15"}
    done = submit(cluster, tmp_path, EXACT, nodes=2, environment=wrong).wait()
    assert (done.status, done.stderr) == (1, "FAILED"), done.stdout
    who = r"rank \d on node[12] \(127\.0\.0\.1\)"  # whichever side gave up first
    assert re.search(rf"{who}( and {who})* cannot be reached from rank \d on node[12]", done.stdout), done.stdout
    assert "name the interface that connects the nodes in GLOO_SOCKET_IFNAME" in done.stdout
    assert "not requeued" in done.stdout


def test_two_jobs_on_a_node_at_the_same_time_do_not_meet(cluster, plain: Finished, tmp_path):
    shared = {"ISOTUNE_CACHE": str(tmp_path / "cache")}
    jobs = [
        submit(cluster, tmp_path / name, EXACT, options=("--nodelist=node1",), environment=shared)
        for name in ("one", "two")
    ]
    for job in jobs:
        job.wait_for_step(1)
    assert [job.facts()["JobState"] for job in jobs] == ["RUNNING", "RUNNING"]
    ports = [re.search(r"rendezvous at node1:(\d+)", job.text) for job in jobs]
    assert ports[0] and ports[1] and ports[0][1] != ports[1][1]
    for job in jobs:
        done = job.wait()
        assert done.status == 0, done.stdout
        assert bits(done.run) == bits(plain.run)
