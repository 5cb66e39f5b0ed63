"""The scripts on pairs with numbers, as a user types them: found, trained, evaluated, and loaded by others."""

import importlib.util
import json
import sys

import numpy as np
import pytest
import yaml
from scipy.stats import pearsonr
from tests.label_sets import pair_encoder, rows_of, write_rows
from tests.launching import TINY_CLASSIFIER, Finished, start
from transformers import pipeline

from isotune.io.errors import run_script

SCRIPT = "train/yelp.py"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> dict:
    """A recipe that names neither the columns nor the kind of labels."""
    folder = tmp_path_factory.mktemp("pairs")
    files = {f"{key}dataset_name": write_rows(folder / f"{key}rows.jsonl", rows_of("regression", count, seed))
             for key, count, seed in (("", 60, 0), ("eval_", 30, 1))}  # fmt: skip
    model = pair_encoder(folder / "model", "bert")
    return {**TINY_CLASSIFIER, **files, "model_name_or_path": model, "exact_gradients": True, "optim": "adamw_torch"}


@pytest.fixture(scope="module")
def one(recipe, tmp_path_factory) -> Finished:
    return start(tmp_path_factory.mktemp("one"), recipe, script=SCRIPT)


def told(finished: Finished) -> list[dict]:
    speed = ("seconds", "per_second", "memory_bytes")
    return [{k: v for k, v in line.items() if not k.endswith(speed)} for line in finished.lines]


def predictions(finished: Finished) -> list[dict]:
    (file,) = (finished.run / "eval").glob("step-*/predictions.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_what_was_found_is_said_recorded_and_saved_with_the_model(one):
    kept = yaml.safe_load((one.run / "recipe.yaml").read_text())
    assert (kept["task_type"], kept["dataset_text_field"], kept["dataset_text_pair_field"]) == (
        "regression", "sentence1", "sentence2")  # fmt: skip
    config = json.loads((one.run / "model" / "config.json").read_text())
    assert config["problem_type"] == "regression" and len(config["id2label"]) == 1
    assert "so task_type is regression" in one.stdout and "eval_loss" in one.stderr and "pearson" in one.stderr
    assert one.environment["data"]["train"]["task_type"] == "regression"
    lines = predictions(one)
    numbers, labels = ([line[key] for line in lines] for key in ("prediction", "label"))
    last = one.evaluations[-1]
    assert last["eval_loss"] == pytest.approx(np.mean(np.square(np.subtract(numbers, labels))), rel=1e-5)
    assert last["eval_pearson"] == pytest.approx(pearsonr(numbers, labels).statistic, rel=1e-6)
    assert (one.run / "loss_curve.png").is_file()
    assert "| step | epoch | pearson | spearman |" in (one.run / "model" / "README.md").read_text()


def test_two_processes_give_the_same_numbers_and_predictions(one, recipe, tmp_path):
    two = start(tmp_path, recipe, processes=2, script=SCRIPT)
    assert two.environment["world_size"] == 2
    assert told(two) == told(one) and predictions(two) == predictions(one)


def test_the_evaluation_and_a_stock_pipeline_give_the_numbers_of_the_run(one, recipe, repository, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("classify_script", repository / "eval" / "classify.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(sys, "argv", ["eval/classify.py", "--run_dir", str(one.run), "--resamples", "100"])
    with pytest.raises(SystemExit) as end:
        run_script(script.main)
    assert end.value.code == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "the largest errors first:" in said and "spearman" in said
    (folder,) = [path for path in (one.run / "eval").iterdir() if (path / "metrics.json").is_file()]
    found = json.loads((folder / "metrics.json").read_text())
    assert found["task_type"] == "regression" and found["label_names"] == []
    last = one.evaluations[-1]
    assert found["mean_squared_error"] == pytest.approx(last["eval_loss"], rel=1e-5)
    assert found["intervals"]["pearson"][0] <= found["pearson"] <= found["intervals"]["pearson"][1]
    assert found["pearson"] == pytest.approx(last["eval_pearson"], rel=1e-4)
    names = {path.stem for path in folder.glob("*.png")}
    assert "predicted" in names and "confusion_matrix" not in names and any("attention" in name for name in names)
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    numbers = [line["prediction"] for line in lines]
    assert numbers == pytest.approx([line["prediction"] for line in predictions(one)], abs=1e-5)
    stock = pipeline("text-classification", model=str(one.run / "model"), device="cpu")
    rows = rows_of("regression", 30, 1)
    texts = [{"text": row["sentence1"], "text_pair": row["sentence2"]} for row in rows]
    how = {"function_to_apply": "none", "truncation": "longest_first", "max_length": recipe["max_seq_length"]}
    scores = [stock(text, **how)["score"] for text in texts[:8]]
    assert scores == pytest.approx(numbers[:8], abs=1e-5)
