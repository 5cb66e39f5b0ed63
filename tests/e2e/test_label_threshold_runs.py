"""Label thresholds of whole runs: recorded beside the weights, and used by evaluation, prediction and exports."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score
from tests.label_sets import pair_encoder, rows_of, write_rows
from tests.launching import TINY_CLASSIFIER, run_command, start_together

from isotune.data.classification.thresholds import THRESHOLDS_FILE
from isotune.evaluation.classification.sentences import predict_texts
from isotune.evaluation.models import load_run_classifier


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """Runs with thresholds that are chosen and given, and one that says nothing."""
    folder = tmp_path_factory.mktemp("thresholds")
    files = [write_rows(folder / f"{name}.jsonl", rows_of("multi_label", count, seed, pairs=False))
             for name, count, seed in (("train", 200, 0), ("test", 60, 1))]  # fmt: skip
    own = {**TINY_CLASSIFIER, "model_name_or_path": pair_encoder(folder / "model", "bert"), "max_seq_length": 40,
           "dataset_name": files[0], "eval_dataset_name": files[1], "max_steps": 12, "global_batch_size": 16,
           "learning_rate": 2e-3, "task_type": "multi_label", "sentences": ["the sea and the rain"]}  # fmt: skip
    recipes = {
        "chosen": own | {"label_thresholds": "chosen"},
        "given": own | {"label_thresholds": [0.05, 0.3, 0.5, 0.95]},
        "plain": own,
    }
    found = start_together(folder, recipes, script="train/yelp.py")
    assert "thresholds" in found["chosen"].stdout and "texts that were kept back" in found["chosen"].stdout
    return {name: run.run for name, run in found.items()}


def classify(*flags: str) -> Any:
    return run_command([sys.executable, "eval/classify.py", "--no_pictures", "--resamples", "50", *flags])


def probabilities_of(lines: list[dict]) -> np.ndarray:
    return np.array([line["probabilities"] for line in lines])


def lines_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("name", ["chosen", "given", "plain"])
def test_evaluation_and_prediction_use_the_thresholds_of_the_run(runs, name):
    run = runs[name]
    values = [0.5] * 4
    if name != "plain":
        values = list(json.loads((run / "model" / THRESHOLDS_FILE).read_text())["label_thresholds"].values())
    assert name != "given" or values == [0.05, 0.3, 0.5, 0.95]
    assert name != "chosen" or values != [0.5] * 4
    done = classify("--run_dir", str(run))
    assert done.returncode == 0, done.stderr
    (folder,) = [path.parent for path in run.glob("eval/*/metrics.json")]
    facts, lines = json.loads((folder / "metrics.json").read_text()), lines_of(folder / "predictions.jsonl")
    sure = probabilities_of(lines)
    chosen = sure >= np.array(values)
    assert np.atleast_1d(facts["label_thresholds"]).tolist() == (values if name != "plain" else [0.5])
    assert [line["prediction"] for line in lines] == [np.flatnonzero(row).tolist() for row in chosen]
    truth = np.array([[k in line["label"] for k in range(4)] for line in lines])
    assert facts["f1_micro"] == pytest.approx(f1_score(truth, chosen, average="micro"))
    last = lines_of(max(run.glob("eval/step-*/predictions.jsonl")))
    in_training = np.array(values if name == "given" else [0.5] * 4)  # chosen ones are not known yet
    assert [line["prediction"] for line in last] == [
        np.flatnonzero(row).tolist() for row in probabilities_of(last) >= in_training
    ]
    classifier = load_run_classifier(run, torch.device("cpu"), torch.float32)
    asked = [row["text"] for row in rows_of("multi_label", 60, 1, pairs=False)]
    assert [len(labels) for labels in predict_texts(classifier, asked)] == [
        len(lines[row]["prediction"]) for row in range(60)
    ]


def test_thresholds_of_the_command_line_win_and_go_along_with_an_export(runs, tmp_path):
    run, out = runs["given"], tmp_path / "exported"
    done = run_command([sys.executable, "-m", "isotune.cli", "export", str(run), "--output", str(out)])
    assert done.returncode == 0, done.stderr
    assert (out / THRESHOLDS_FILE).read_text() == (run / "model" / THRESHOLDS_FILE).read_text()
    for flags, expected in (([], [0.05, 0.3, 0.5, 0.95]), (["--label_thresholds", "0.2"], [0.2] * 4)):
        folder = tmp_path / f"out{len(flags)}"
        test = str(run.parents[1] / "test.jsonl")
        done = classify("--model", str(out), "--dataset_name", test, "--output_dir", str(folder), *flags)
        assert done.returncode == 0, done.stderr
        assert json.loads((folder / "metrics.json").read_text())["label_thresholds"] == expected
    done = classify("--model", str(out), "--dataset_name", "x.jsonl", "--label_thresholds", "2")
    assert done.returncode == 2 and "a threshold is between 0 and 1" in done.stderr
