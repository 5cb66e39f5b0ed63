"""The other batch files: evaluation of a finished run, and a sweep that ends in one table though jobs are stopped."""

import json

import pytest
from tests.launching import TINY_CLASSIFIER, Finished, write_recipe
from tests.slurm.jobs import Site

pytestmark = pytest.mark.slow
RUNS = {f"lr{rate}": rate for rate in ("1e-4", "3e-4", "1e-3", "3e-3", "1e-2", "3e-2")}


def test_an_evaluation_job_finds_what_training_found(cluster: Site, plain: Finished, tmp_path):
    flags = ("--run_dir", str(plain.run), "--output_dir", str(tmp_path / "result"), "--no_pictures")
    job = cluster.submit_as_it_is(tmp_path, "slurm/eval.sbatch", *flags)
    done = job.wait()
    assert done.status == 0, done.stdout
    found = json.loads((tmp_path / "result" / "metrics.json").read_text())
    assert found["rows"] == 120
    assert found["accuracy"] == pytest.approx(plain.evaluations[-1]["eval_accuracy"], abs=1e-6)


def test_an_array_of_six_runs_one_of_them_pushed_out_leaves_six_results_and_one_comparison(cluster: Site, tmp_path):
    table = tmp_path / "rates.txt"
    table.write_text("# learning rates\n" + "".join(f"{name}  --learning_rate {rate}\n" for name, rate in RUNS.items()))
    recipe = write_recipe(tmp_path, TINY_CLASSIFIER | {"max_steps": 40})
    sweep = tmp_path / "sweep"
    job = cluster.submit_as_it_is(
        tmp_path,
        "slurm/sweep.sbatch",
        str(table),
        "--config",
        str(recipe),
        options=("--array=1-6%3", "--gpus-per-node=1"),
        environment={"SWEEP": str(sweep)},
    )
    first = sweep / "lr1e-4" / "metrics.jsonl"
    job.wait_for("a step", first.exists)
    cluster.ask("sbatch", "--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    job.wait_for("comparison", (sweep / "comparison.txt").exists, 1500)
    for name in RUNS:
        steps = [json.loads(line) for line in (sweep / name / "metrics.jsonl").read_text().splitlines()]
        assert [one["step"] for one in steps if "loss" in one] == list(range(1, 41))
        assert json.loads((sweep / name / "eval" / "sweep" / "metrics.json").read_text())["rows"] == 120
    assert "requeued" in job.text
    table_of_all = (sweep / "comparison.txt").read_text()
    assert all(name in table_of_all for name in RUNS)


def test_an_array_that_is_longer_than_its_table_says_so(cluster: Site, tmp_path):
    table = tmp_path / "one.txt"
    table.write_text("only  --seed 1\n")
    job = cluster.submit_as_it_is(tmp_path, "slurm/sweep.sbatch", str(table), options=("--array=2",))
    job.wait_for("end", lambda: "has 1 runs and no run 2" in job.text)
