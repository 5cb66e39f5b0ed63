"""A run ends where its evaluations stop getting better, whatever lives it had, and the best is chosen by any figure."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.building import Built, build_classifier

from isotune.config import ClassificationRecipe, Recipe
from isotune.data.sources.source import find_corpus
from isotune.io.errors import UserError

# What the evaluations are made to find, every second step: where to stop must not hang on how well a tiny model learns.
LOSSES = (1.0, 0.9, 0.89, 0.8, 0.85, 0.81, 0.3, 0.2, 0.1, 0.0)
ACCURACIES = (0.3, 0.2, 0.5, 0.6, 0.7, 0.71, 0.68, 0.9, 0.95, 1.0)
STOP = {"eval_loss": (12, 8), "eval_accuracy": (14, 12)}  # counted by hand: the last step, and the best up to there
RUN = {"max_steps": 20, "eval_steps": 2, "save_steps": 2, "save_total_limit": 50, "microbatch_tokens": 1024}
STOPS = {"early_stopping_patience": 2, "early_stopping_threshold": 0.02}


def build(folder: Path, **values: Any) -> Built:
    """A run whose evaluations find what is written above."""
    built = build_classifier(folder, **RUN, **values)

    def evaluate(run: Any) -> dict[str, float]:
        number = built.trainer.state.global_step // 2 - 1
        return {"eval_loss": LOSSES[number], "eval_accuracy": ACCURACIES[number]}

    built.trainer.plan.task.evaluate = evaluate
    return built


def evaluations(built: Built) -> list[dict]:
    return [line for line in built.lines if "eval_loss" in line]


def told(lines: list[dict]) -> list[dict]:
    """What lines say of the experiment, without what is measured by a clock or of this process."""
    changing = ("step_seconds", "tokens_per_second", "peak_memory_bytes", "eval_seconds")
    return [{key: value for key, value in line.items() if key not in changing} for line in lines]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> list[dict]:
    """The lines of the run that nothing stops."""
    return build(tmp_path_factory.mktemp("whole")).train()


@pytest.mark.parametrize("metric", STOP)
def test_training_ends_after_so_many_evaluations_without_a_better_one_and_the_best_is_kept(
    tmp_path, capsys, whole, metric
):
    end, best = STOP[metric]
    built = build(tmp_path, **STOPS, metric_for_best_model=metric, load_best_model_at_end=True)
    lines = built.train()
    said = capsys.readouterr()
    assert told(lines) == told([line for line in whole if line["step"] <= end])
    assert f"early after step {end}: {metric} has not been better than" in said.err
    assert f"best        step {best}:" in said.out


@pytest.mark.parametrize("step", [pytest.param(10, marks=pytest.mark.slow), 12])
def test_a_resumed_run_counts_on_where_it_was(tmp_path, step):
    first = build(tmp_path / "first", **STOPS)
    first.train()
    second = build(tmp_path / "second", **STOPS, resume=str(checkpoint_of(first, step)))
    assert told(second.train()) == told(first.lines)
    assert second.lines[-1]["step"] == 12


def test_a_run_that_was_killed_after_an_epochs_evaluation_stopped_it_is_not_trained_any_further(tmp_path):
    rows = find_corpus("builtin:opinions").rows("train")[:30]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {name: str(tmp_path / "rows.jsonl") for name in ("dataset_name", "eval_dataset_name")}
    epochs = {**data, "global_batch_size": 10, "max_steps": -1, "num_train_epochs": 5, "save_strategy": "epoch"}
    stops = {"early_stopping_patience": 1, "early_stopping_threshold": 100.0, "save_total_limit": 50}
    first = build_classifier(tmp_path / "first", **epochs, **stops)
    lines = first.train()
    assert [line["epoch"] for line in evaluations(first)] == [1.0, 2.0]
    last = checkpoint_of(first, lines[-1]["step"])
    second = build_classifier(tmp_path / "second", **epochs, **stops, resume=str(last))
    assert told(second.train()) == told(lines)


def checkpoint_of(built: Built, step: int) -> Path:
    """The checkpoint that a run wrote after this step."""
    return built.run.path / "checkpoints" / f"step-{step:08d}"


@pytest.mark.parametrize(
    ("kind", "said", "near"),
    [
        (ClassificationRecipe, "eval_acuracy", "did you mean eval_accuracy?"),
        (ClassificationRecipe, "accuracy", "did you mean eval_accuracy?"),
        (ClassificationRecipe, "eval_perplexity", "it takes eval_loss, eval_accuracy"),
        (Recipe, "eval_accuracy", "it takes eval_loss, eval_perplexity"),
        (Recipe, "loss", "did you mean eval_loss?"),
    ],
)
def test_a_figure_that_the_kind_of_run_does_not_give_is_refused_with_the_nearest_name(kind, said, near):
    values = {"model_name_or_path": "m", "dataset_name": "d", "output_dir": "o", "eval_dataset_name": "e"}
    with pytest.raises(UserError) as refused:
        kind.from_values(**values, metric_for_best_model=said)
    assert f"metric_for_best_model is '{said}'" in str(refused.value) and near in str(refused.value)


def test_when_one_evaluates_is_part_of_the_experiment_once_the_result_hangs_on_it():
    values = {"model_name_or_path": "m", "dataset_name": "d", "output_dir": "o", "eval_dataset_name": "e"}

    def fingerprint(**more) -> str:
        return ClassificationRecipe.from_values(**values, **more).fingerprint()

    assert fingerprint(eval_steps=5) == fingerprint(eval_steps=6)
    assert fingerprint(eval_steps=5, early_stopping_patience=1) != fingerprint(eval_steps=6, early_stopping_patience=1)
