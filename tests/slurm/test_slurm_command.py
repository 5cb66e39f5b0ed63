"""`isotune slurm` from a folder that is no checkout: the job that it submits gives what a plain local run gives."""

import re
import sys
from pathlib import Path

import pytest
from tests.launching import Finished, write_recipe
from tests.slurm.jobs import EXACT, Job, Site, bits


@pytest.mark.slow
def test_a_submitted_recipe_on_two_nodes_ends_with_the_bits_of_a_plain_run(
    cluster: Site, plain: Finished, tmp_path: Path
):
    recipe = write_recipe(tmp_path, EXACT)
    words = ["slurm", "classify", str(recipe), "--nodes", "2", "--gpus_per_node", "2", "--cpus_per_task", "1"]
    file = tmp_path / "mine.sbatch"
    printed = cluster.ask(
        sys.executable, "-m", "isotune.cli", *words, "--batch_file", str(file),
        variables={"LOGS": str(tmp_path), "SBATCH_OUTPUT": str(tmp_path / "job.log"), "ISOTUNE_HOME": str(tmp_path)},
    )  # fmt: skip
    number = re.search(r"Submitted batch job (\d+)", printed)
    assert number is not None and f"batch file  {file}" in printed
    done = Job(cluster, number[1], tmp_path / "run", tmp_path / "job.log").wait()
    assert (done.status, done.stderr) == (0, "COMPLETED"), done.stdout
    assert done.environment["world_size"] == 4
    assert bits(done.run) == bits(plain.run)
