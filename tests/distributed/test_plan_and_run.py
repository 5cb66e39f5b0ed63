"""What a plan says beforehand is what a real launch then does: bytes and numbers of each rank, steps and tokens."""

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from tests.launching import REPOSITORY, TINY, TINY_CLASSIFIER, Finished, start, start_together, write_recipe
from transformers import OPTConfig

from isotune.preflight.preflight_report import PreflightReport, run_preflight
from isotune.preflight.request import read_preflight_request

RECIPE = TINY | {"global_batch_size": 5, "microbatch_tokens": 256, "max_steps": 4, "save_strategy": "no"}


def planned(folder: Path, recipe: dict[str, Any], config: str, processes: int) -> PreflightReport:
    file = write_recipe(folder / "planned", recipe)
    launch = str(REPOSITORY / "accelerate_configs" / config)
    asked = read_preflight_request(file, [], launch, processes)
    assert asked.problems == ()
    return run_preflight(asked, show_progress=False)


def in_effect(run: Finished) -> dict[str, Any]:
    return run.environment["in_effect"]


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("config", "processes", "values"),
    [
        ("zero2.yaml", 2, {"bf16": True}),
        slow("zero2.yaml", 3, {"bf16": True}),
        slow("ddp.yaml", 2, {}),
        slow("ddp.yaml", 2, {"tune": "lora"}),
        slow("zero1.yaml", 3, {}),
        slow("zero2.yaml", 2, {"tune": "lora"}),
        slow("zero3.yaml", 3, {}),
        slow("zero3.yaml", 2, {"bf16": True}),
        slow("fsdp2.yaml", 3, {}),
        slow("fsdp2.yaml", 2, {"tune": "lora", "bf16": True}),
    ],
)
def test_weights_optimizer_and_work_are_as_planned(tmp_path, config, processes, values, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    recipe = RECIPE | values
    plan = planned(tmp_path, recipe, config, processes)
    run = start(tmp_path, recipe, processes=processes, config=config)
    found = in_effect(run)
    assert plan.memory.weights == found["parameter_bytes_per_rank"]
    assert plan.memory.optimized_numel == found["optimized_numbers_per_rank"]
    assert plan.model.trained_numel == found["trained_parameters"]
    assert plan.model.numel == found["all_parameters"]
    assert_work(plan, run)


def assert_work(plan: PreflightReport, run: Finished) -> None:
    """The counts of the plan's steps against the lines that the run wrote."""
    work = plan.work
    assert work is not None
    assert work.steps == len(run.steps)
    seen = list(islice(run.steps, work.steps))
    assert work.tokens_per_step == pytest.approx(sum(line["input_tokens"] for line in seen) / len(seen), rel=1e-12)
    targets = "supervised_tokens" if "supervised_tokens" in seen[0] else "documents"  # a document has one class
    assert work.targets_per_step == pytest.approx(sum(line[targets] for line in seen) / len(seen), rel=1e-12)


@pytest.mark.parametrize("processes", [*(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2)), 3])
def test_real_conversations_are_counted_as_the_plan_of_training_counts_them(shared_data, tmp_path, processes):
    """An independent count: the documents' own lengths, packed by hand into passes."""
    model = tmp_path / "model"  # whose embedding has a row for every token
    OPTConfig(vocab_size=50_272, hidden_size=64, num_hidden_layers=2, num_attention_heads=4).save_pretrained(model)
    flags = {
        "model_name_or_path": str(model),
        "tokenizer_name_or_path": str(shared_data / "tokenizers" / "opt"),
        "dataset_name": str(shared_data / "guanaco"),
        "max_seq_length": 512,
        "global_batch_size": 7,
        "num_train_epochs": 2,
        "output_dir": str(tmp_path),
    }
    words = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
    work = run_preflight(read_preflight_request(None, words, None, processes), show_progress=False).work
    assert work is not None
    assert work.steps_per_epoch == -(-work.rows // 7) and work.steps == 2 * work.steps_per_epoch
    assert work.microbatches_per_step == 7, "a row of 512 tokens is a pass"
    assert work.microbatches_per_rank == -(-7 // processes)
    assert work.packing_efficiency == pytest.approx(work.tokens / (work.rows * 512))
    assert 0 <= work.imbalance < processes


REAL = {
    "guanaco": ("train/sft_opt.py", TINY | {"max_seq_length": 256, "microbatch_tokens": 512, "global_batch_size": 11}),
    "imdb": ("train/imdb.py", TINY_CLASSIFIER | {"microbatch_tokens": 256, "global_batch_size": 23}),
}


@pytest.mark.slow  # in short: test_weights_optimizer_and_work_are_as_planned
@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("name", ["imdb", "guanaco"])
def test_a_run_on_real_texts_does_what_its_plan_counted(shared_data, tmp_path, name, processes, monkeypatch):
    """Steps, tokens and targets of all steps; in the first, the passes that each rank makes."""
    monkeypatch.chdir(REPOSITORY)
    script, recipe = REAL[name]
    recipe |= {"dataset_name": str(shared_data / name), "save_strategy": "no"}
    recipe = {key: value for key, value in recipe.items() if key != "eval_dataset_name"}
    recipes = {"three": recipe | {"max_steps": 3}, "one": recipe | {"max_steps": 1}}
    plans = {key: planned(tmp_path / key, value, "ddp.yaml", processes) for key, value in recipes.items()}
    runs = start_together(tmp_path, recipes, processes=processes, counted_step=1, script=script)
    for key, run in runs.items():
        assert_work(plans[key], run)
    work = plans["one"].work
    assert work is not None and work.microbatches_per_step > 1
    assert [rank["passes"] for rank in runs["one"].collectives] == [work.microbatches_per_rank] * processes
    assert f"the first: {work.microbatches_per_step} microbatches" in runs["one"].stdout


@pytest.mark.parametrize(("script", "recipe"), [("train/sft_opt.py", TINY), ("train/yelp.py", TINY_CLASSIFIER)])
def test_plan_only_prints_the_plan_and_leaves_nothing(tmp_path, script, recipe):
    run = start(tmp_path, recipe, "--plan_only", script=script)
    assert "work        6 steps" in run.stdout and "activations and loss" in run.stdout
    assert not run.run.exists()


def test_a_run_says_beforehand_what_it_will_hold(tmp_path):
    run = start(tmp_path, TINY | {"max_steps": 1, "save_strategy": "no"})
    line = next(line for line in run.stdout.splitlines() if line.startswith("memory "))
    held = in_effect(run)["parameter_bytes_per_rank"] / 2**20
    assert f"weights {held:.2f} MiB" in line
