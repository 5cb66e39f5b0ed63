"""The classic mistakes of launching on SLURM, put into a copy of the shipped files: each fails, so none comes back."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.launching import REPOSITORY
from tests.slurm.jobs import Job, Site

# what the batch script and node.sh hand over is all that these tests look at: no rank trains
BATCH = """#!/usr/bin/env bash
. "$ISOTUNE_HOME/slurm/launch.sh" || exit 2
launch tests/slurm/say_rank.py
"""
SAID = re.compile(r"rank (\d+) of (\d+) on port (\d+)")


@pytest.fixture
def submit(cluster: Site, tmp_path: Path) -> Callable[..., Job]:
    """Submit say_rank.py by a copy of slurm/ in which words were replaced: (file, right, wrong)."""

    def submit(*wrong: tuple[str, str, str], name: str = "one", stay: int = 0, gpus: int = 2) -> Job:
        home = tmp_path / name
        home.mkdir()
        for part in ("accelerate_configs", "ds_configs", "tests", ".venv"):
            (home / part).symlink_to(REPOSITORY / part)
        shutil.copytree(REPOSITORY / "slurm", home / "slurm")
        for file, right, instead in wrong:
            text = (home / "slurm" / file).read_text()
            assert text.count(right) == 1, f"{file} no longer has {right}"
            (home / "slurm" / file).write_text(text.replace(right, instead))
        (home / "batch").write_text(BATCH)
        variables = {"ISOTUNE_HOME": str(home), "STAY_SECONDS": str(stay)}
        options = (f"--gpus-per-node={gpus}",)
        return cluster.submit(home, str(home / "batch"), nodes=2, options=options, environment=variables)

    return submit


def ranks(job: Job) -> list[tuple[int, int]]:
    """(rank, world size) of every process that came to life."""
    return sorted((int(rank), int(size)) for rank, size, _ in SAID.findall(job.text))


def test_as_shipped_every_rank_is_there_once_and_two_jobs_of_the_same_nodes_have_ports_of_their_own(submit):
    jobs = [submit(name=name, stay=7, gpus=gpus) for name, gpus in (("one", 2), ("two", 1))]
    for job, size in zip(jobs, (4, 2), strict=True):
        assert job.wait().status == 0, job.text
        assert ranks(job) == [(rank, size) for rank in range(size)], job.text
    ports = [{port for _, _, port in SAID.findall(job.text)} for job in jobs]
    assert len(ports[0]) == len(ports[1]) == 1 and ports[0] != ports[1]


@pytest.mark.slow
def test_a_machine_rank_expanded_on_the_batch_host_is_0_on_every_node_and_nobody_meets(submit):
    job = submit(
        ("launch.sh", "export NODES=", "export RANK_FROM_BATCH=$SLURM_PROCID NODES="),
        ("node.sh", "rank=$SLURM_NODEID", "rank=$RANK_FROM_BATCH"),
        ("launch.sh", "srun --nodes", "timeout 45 srun --nodes"),
    )
    done = job.wait()
    assert done.status != 0 and {size for _, size in ranks(job)} <= {4}
    assert [rank for rank, _ in ranks(job)] != [0, 1, 2, 3], job.text


@pytest.mark.slow
def test_with_a_fixed_port_the_second_job_of_the_same_nodes_fails(submit):
    fixed = ("launch.sh", "    find_port\n", "    PORT=29500\n")
    first = submit(fixed, name="one", stay=40)
    first.wait_for("ranks", lambda: len(ranks(first)) == 4)
    second = submit(fixed, name="two").wait()
    assert second.status != 0 and "29500" in second.stdout
    first.wait()
    assert len(ranks(first)) == 4


@pytest.mark.slow
def test_processes_of_a_node_given_as_their_total_leave_half_of_the_gpus_idle(submit):
    job = submit(("node.sh", "--num_processes $((NODES * PROCESSES))", '--num_processes "$PROCESSES"'))
    job.wait()
    assert ranks(job) == [(0, 2), (1, 2)], job.text  # and four GPUs are paid for
