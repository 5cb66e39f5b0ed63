"""A job on one node or many gives what a plain local run gives, stopped in the middle or not."""

import json
from typing import Any

import pytest
from tests.launching import TINY, TINY_CLASSIFIER, Finished, start, write_recipe
from tests.slurm.jobs import EXACT, Site, bits, verdicts

# fewer processes to start; several nodes, and several GPUs a node, are in test_slurm_mistakes.py and the slow tests
ONE_GPU_A_NODE = ("--gpus-per-node=1",)


@pytest.mark.parametrize("nodes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_job_that_an_urgent_one_pushed_out_ends_with_the_bits_of_a_plain_run(
    cluster: Site, plain: Finished, tmp_path, nodes
):
    recipe = write_recipe(tmp_path, EXACT)
    job = cluster.submit(tmp_path, "slurm/yelp.sbatch", "--config", str(recipe), nodes=nodes, options=ONE_GPU_A_NODE)
    job.wait_for_step(3)
    cluster.ask("sbatch", "--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    done = job.wait()
    assert (done.status, done.stderr) == (0, "COMPLETED"), done.stdout
    assert [one["status"] for one in verdicts(job)] == ["preempted", "finished"], done.stdout
    stopped = verdicts(job)[0]["step"]
    assert 3 <= stopped < EXACT["max_steps"]
    assert f"resumed     after step {stopped}, from " in done.stdout
    assert bits(done.run) == bits(plain.run)
    assert done.environment["world_size"] == nodes
    assert done.environment["slurm"] == {
        "job_id": job.number,
        "job_name": "isotune-yelp",
        "partition": "main",
        "nodes": done.environment["slurm"]["nodes"],
        "restart": 1,
    }
    assert "restarts    1 (led by node" in done.stdout
    engine = "BertForSequenceClassification" if nodes == 1 else "DistributedDataParallel"
    assert f"engine      {engine} on {nodes} x" in done.stdout
    logs = sorted(file.stem for file in job.lives[0].parent.glob("attempt-1-*.log"))
    assert len(logs) == nodes and {name.rstrip("123") for name in logs} == {"attempt-1-node"}


def test_a_recipe_that_is_wrong_fails_once_with_its_sentence_and_is_not_requeued(cluster: Site, tmp_path):
    job = cluster.submit(tmp_path, "slurm/yelp.sbatch", "--learning_rat", "1", nodes=2, options=ONE_GPU_A_NODE)
    done = job.wait()
    assert (done.status, done.stderr) == (2, "FAILED")
    assert "error: --learning_rat is not a key: did you mean --learning_rate?" in done.stdout
    assert "not requeued" in done.stdout and 'Traceback (most recent call last):\n  File "train' not in done.stdout
    assert [(one["status"], one["exit_status"]) for one in verdicts(job)] == [("failed", 2)]
    assert not job.run.exists()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3"])
@pytest.mark.parametrize("nodes", [1, 2, 3])
def test_losses_and_predictions_are_those_of_a_plain_run_on_any_number_of_nodes(
    cluster: Site, plain_without: Finished, tmp_path, nodes, engine
):
    recipe = write_recipe(tmp_path, TINY_CLASSIFIER)
    job = cluster.submit(
        tmp_path, "slurm/yelp.sbatch", "--config", str(recipe), nodes=nodes, environment={"ENGINE": engine}
    )
    done = job.wait()
    assert done.status == 0, done.stdout
    assert done.environment["world_size"] == 2 * nodes
    assert done.environment["in_effect"].get("zero_stage") == {"zero2": 2, "zero3": 3}.get(engine)
    for one, other in zip(done.steps, plain_without.steps, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
    for one, other in zip(predictions(done), predictions(plain_without), strict=True):
        assert (one["id"], one["prediction"]) == (other["id"], other["prediction"])
        assert one["probabilities"] == pytest.approx(other["probabilities"], rel=1e-4)


@pytest.mark.slow
def test_instruction_tuning_under_zero3_on_two_nodes_has_the_losses_of_a_plain_run(cluster: Site, tmp_path):
    recipe = write_recipe(tmp_path, TINY)
    flags = ("--config", str(recipe))
    job = cluster.submit(tmp_path, "slurm/sft_opt.sbatch", *flags, nodes=2, environment={"ENGINE": "zero3"})
    done = job.wait()
    assert done.status == 0, done.stdout
    assert (done.environment["world_size"], done.environment["in_effect"]["zero_stage"]) == (4, 3)
    plain = start(tmp_path / "plain", TINY)
    for one, other in zip(done.steps, plain.steps, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_a_cancelled_job_under_zero_goes_on_on_fewer_nodes_with_the_losses_of_a_plain_run(
    cluster: Site, tmp_path, engine
):
    values = TINY_CLASSIFIER | {"max_steps": 40, "save_steps": 25}
    flags = ("--config", str(write_recipe(tmp_path, values)))
    job = cluster.submit(tmp_path, "slurm/yelp.sbatch", *flags, nodes=2, environment={"ENGINE": engine})
    job.wait_for_step(3)
    cluster.ask("scancel", job.number)
    assert job.wait().stderr == "CANCELLED"
    stopped = verdicts(job)[0]["step"]
    assert 3 <= stopped < values["max_steps"]

    done = cluster.submit(tmp_path, "slurm/yelp.sbatch", *flags, nodes=1, environment={"ENGINE": engine}).wait()
    assert done.status == 0 and f"resumed     after step {stopped}, from " in done.stdout, done.stdout
    assert done.environment["world_size"] == 2
    plain = start(tmp_path / "plain", values, script="train/yelp.py")
    assert [one["step"] for one in done.steps] == list(range(1, values["max_steps"] + 1))
    for one, other in zip(done.steps, plain.steps, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5), one["step"]


@pytest.fixture(scope="module")
def plain_without(tmp_path_factory) -> Finished:
    """The recipe TINY_CLASSIFIER, which sums gradients in floating point, on one local process."""
    return start(tmp_path_factory.mktemp("plain"), TINY_CLASSIFIER, script="train/yelp.py")


def predictions(finished: Finished) -> list[dict[str, Any]]:
    """Of the last evaluation."""
    (file,) = sorted(finished.run.glob("eval/*/predictions.jsonl"))[-1:]
    return [json.loads(line) for line in file.read_text().splitlines()]
