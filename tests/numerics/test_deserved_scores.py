"""No run ends with a better score than it deserves: random labels, names in another order, columns that are swapped."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from tests.building import build_classifier
from tests.label_sets import TOPICS, pair_encoder, pair_tokenizer, rows_of, write_rows

from isotune.config import ClassificationRecipe
from isotune.data.classification.split import prepare_labelled
from isotune.evaluation.classification.evaluate import evaluate_rows, read_task_rows
from isotune.evaluation.classification.sentences import predict_texts
from isotune.evaluation.distributed_eval import Ranks
from isotune.evaluation.metrics.regression import regression_statistics
from isotune.evaluation.models import load_run_classifier
from isotune.evaluation.statistics.resampling import score
from isotune.evaluation.tasks import ClassificationTask
from isotune.io.errors import UserError
from isotune.training.from_recipe import save

NAMES = sorted(TOPICS)


def shuffled(rows: list[dict], seed: int) -> list[dict]:
    """The rows with each other's labels."""
    labels = [row["label"] for row in rows]
    random.Random(seed).shuffle(labels)
    return [{**row, "label": label} for row, label in zip(rows, labels, strict=True)]


def trained(tmp_path, train: list[dict], test: list[dict], **values: Any):
    """A run on a few steps of two small files, with its evaluation."""
    files = [write_rows(tmp_path / f"{name}.jsonl", rows) for name, rows in (("train", train), ("test", test))]
    built = build_classifier(
        tmp_path, model_name_or_path=pair_encoder(tmp_path / "model", "bert"), dataset_name=files[0],
        eval_dataset_name=files[1], max_seq_length=40, max_steps=30, global_batch_size=16, learning_rate=2e-3,
        microbatch_tokens=1024, eval_microbatch_tokens=1024, **values,
    )  # fmt: skip
    built.trainer.train()
    return built


def numbers_of(found) -> tuple[np.ndarray, np.ndarray]:
    return found.rows.labels, found.outputs


@pytest.mark.parametrize(
    "task_type",
    ["single_label", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("multi_label", "regression"))],
)
def test_random_labels_are_not_predicted(tmp_path, task_type):
    train, test = (shuffled(rows_of(task_type, 80, seed), seed) for seed in (0, 1))
    pair = {"dataset_text_field": "sentence1", "dataset_text_pair_field": "sentence2"}
    built = trained(tmp_path, train, test, task_type=task_type, **pair)
    save(built.start, built.trainer)
    classifier = load_run_classifier(built.run.path, torch.device("cpu"), torch.float32)
    task = ClassificationTask(dataset_name=str(tmp_path / "test.jsonl"), **pair)
    ranks = Ranks(0, 1, classifier.device)
    found = evaluate_rows(classifier, read_task_rows(task, classifier, ranks), task, ranks, resamples=500)
    assert found is not None
    labels, outputs = numbers_of(found)
    if task_type == "regression":
        low, high = score(regression_statistics(labels, outputs), len(labels), only=["pearson"]).intervals["pearson"]
        assert low <= 0 <= high and found.scores.metrics["r2"] <= 0.05
        return
    codes = labels if task_type == "single_label" else labels @ 2 ** np.arange(labels.shape[1])
    chosen = outputs.argmax(axis=1) if task_type == "single_label" else (outputs >= 0.5) @ 2 ** np.arange(4)
    right, most = int((codes == chosen).sum()), np.bincount(codes).max() / len(codes)
    assert binomtest(right, len(codes), most, alternative="greater").pvalue > 0.05


def test_labels_in_another_order_are_found_by_name_and_other_names_are_refused(tmp_path):
    rows = rows_of("multi_label", 60, pairs=False)
    built = trained(tmp_path, rows, rows[:20], task_type="multi_label", label_names=NAMES)
    save(built.start, built.trainer)
    classifier = load_run_classifier(built.run.path, torch.device("cpu"), torch.float32)
    ranks = Ranks(0, 1, classifier.device)

    def evaluated(name: str, rows: list[dict]) -> Any:
        task = ClassificationTask(dataset_name=write_rows(tmp_path / f"{name}.jsonl", rows))
        found = evaluate_rows(classifier, read_task_rows(task, classifier, ranks), task, ranks, resamples=100)
        assert found is not None
        return found

    def scores_on(name: str, rows: list[dict]) -> dict[str, float]:
        return evaluated(name, rows).scores.metrics

    own = scores_on("own", rows)
    reordered = [{**row, "label": [name.upper() for name in row["label"][::-1]]} for row in rows]
    in_columns = [{"text": row["text"], **{name: int(name in row["label"]) for name in NAMES[::-1]}} for row in rows]
    asked = predict_texts(classifier, [row["text"] for row in rows])
    chosen = evaluated("again", rows).outputs >= 0.5
    assert [{name for name, _ in labels} for labels in asked] == [
        {NAMES[k] for k in np.flatnonzero(row)} for row in chosen
    ]
    assert scores_on("reordered", reordered) == own == scores_on("columns", in_columns)
    assert {name for name in own if name.startswith("f1[")} == {f"f1[{name}]" for name in NAMES}
    with pytest.raises(UserError, match=r"'fog'.*they are to be bread, chess, rain, sea"):
        scores_on("others", [{**row, "label": ["fog"]} for row in rows])
    with pytest.raises(UserError, match="labels is of single_label"):
        task = ClassificationTask(dataset_name=str(tmp_path / "own.jsonl"), labels=tuple(NAMES))
        read_task_rows(task, classifier, ranks)
    with pytest.raises(UserError, match=r"row 1 of .*holds 3"):
        scores_on("numbers", [{**row, "label": 3.5} for row in rows])


SWAPPED = {
    "the label as the second text": (
        {"dataset_text_field": "sentence1", "dataset_text_pair_field": "label"}, "a column is one thing alone"),
    "the label as the text": ({"dataset_text_field": "label"}, "a column is one thing alone"),
    "one text twice": ({"dataset_text_field": "sentence1", "text_pair": "sentence1"}, "a column is one thing alone"),
    "a text and the label": (
        {"dataset_text_field": "sentence1", "text_pair": "label", "dataset_label_field": "sentence2"},
        "these are texts and no classes"),
    "a text as numbers": (
        {"dataset_text_field": "sentence1", "text_pair": "label", "dataset_label_field": "sentence2",
         "task_type": "regression"}, r"row 1 of .*, column 'sentence2', holds 'second text 0'"),
}  # fmt: skip


@pytest.mark.parametrize("case", SWAPPED)
def test_swapped_columns_are_refused(tmp_path, case):
    keys, sentence = SWAPPED[case]
    lines = [f"first text {n},second text {n},{n % 2}" for n in range(6)]
    (tmp_path / "rows.csv").write_text("\n".join(["sentence1,sentence2,label", *lines]) + "\n")
    common = {"model_name_or_path": "x", "output_dir": "run", "dataset_name": str(tmp_path / "rows.csv")}
    with pytest.raises(UserError, match=sentence):
        prepare_labelled(ClassificationRecipe.from_values(**common, **keys), pair_tokenizer("bert"), show=False)
