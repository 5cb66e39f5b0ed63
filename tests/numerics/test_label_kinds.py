"""Pairs, numbers and sets of labels against a plain loop over padded batches, whose loss is transformers' own."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import expit, softmax
from scipy.stats import pearsonr, spearmanr
from sklearn import metrics
from tests.building import Built, build_classifier
from tests.label_sets import TOPICS, pair_encoder, rows_of, write_rows
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from isotune.evaluation.metrics.of_type import statistics_of
from isotune.evaluation.statistics.resampling import score

STEPS, BATCH, RATE, LENGTH = 6, 7, 1e-3, 24
NAMES = sorted(TOPICS)
PROBLEMS = {
    "single_label": {"num_labels": 2},
    "multi_label": {"num_labels": 4, "problem_type": "multi_label_classification"},
    "regression": {"num_labels": 1, "problem_type": "regression"},
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
CONFIG = {"distilbert": {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0}}


def labels_of(rows: list[dict], task_type: str) -> torch.Tensor:
    if task_type == "multi_label":
        return torch.tensor([[float(name in row["label"]) for name in NAMES] for row in rows])
    return torch.tensor(
        [row["label"] for row in rows], dtype=torch.int64 if task_type == "single_label" else torch.float32
    )


class Stock:
    """The library's tokenizer, model and loss."""

    weights: torch.Tensor | None = None  # of the labels that a text has, in training

    def __init__(self, folder: str, task_type: str, state: dict, rate: float = RATE, length: int = LENGTH) -> None:
        self.rate, self.length = rate, length
        self.tokenizer, self.task_type = AutoTokenizer.from_pretrained(folder), task_type
        self.model: Any = AutoModelForSequenceClassification.from_pretrained(folder, **PROBLEMS[task_type])
        self.model.load_state_dict(state)

    def batch(self, rows: list[dict]) -> Any:
        columns = [[row[name] for row in rows] for name in ("text", "sentence1", "sentence2") if name in rows[0]]
        batch = self.tokenizer(
            *columns, padding=True, truncation="longest_first", max_length=self.length, return_tensors="pt"
        )
        return {**batch, "labels": labels_of(rows, self.task_type)}

    def train(self, batches: list[list[dict]]) -> tuple[list[float], list[float]]:
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.rate, weight_decay=0.0)
        losses, norms = [], []
        self.model.train()
        for rows in batches:
            batch = self.batch(rows)
            found = self.model(**batch)
            loss = found.loss
            if self.weights is not None:
                loss = torch.nn.BCEWithLogitsLoss(pos_weight=self.weights)(found.logits, batch["labels"])
            optimizer.zero_grad()
            loss.backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)))
            optimizer.step()
            losses.append(loss.item())
        return losses, norms

    @torch.no_grad()
    def evaluate(self, rows: list[dict]) -> tuple[float, np.ndarray]:
        self.model.eval()
        found = self.model(**self.batch(rows))
        return found.loss.item(), found.logits.numpy()


def built_for(tmp_path, kind: str, task_type: str, *, pairs: bool, **values: Any) -> tuple[Built, str, list, list]:
    folder = pair_encoder(tmp_path / "model", kind, **CONFIG.get(kind, NO_DROPOUT))
    train, test = rows_of(task_type, 50, pairs=pairs), rows_of(task_type, 40, seed=1, pairs=pairs)
    files = [write_rows(tmp_path / f"{name}.jsonl", rows) for name, rows in (("train", train), ("test", test))]
    built = build_classifier(
        tmp_path, model_name_or_path=folder, dataset_name=files[0], eval_dataset_name=files[1], max_seq_length=LENGTH,
        max_steps=STEPS, global_batch_size=BATCH, learning_rate=RATE, lr_scheduler_type="constant",
        weight_decay=0.0, optim="adamw_torch", microbatch_tokens=64, eval_microbatch_tokens=64, **values,
    )  # fmt: skip
    return built, folder, train, test


def expected_metrics(task_type: str, labels: np.ndarray, logits: np.ndarray) -> dict[str, float]:
    if task_type == "regression":
        y = logits[:, 0].astype(np.float64)
        return {"eval_pearson": pearsonr(labels, y).statistic, "eval_spearman": spearmanr(labels, y).statistic,
                "eval_mean_absolute_error": metrics.mean_absolute_error(labels, y),
                "eval_r2": metrics.r2_score(labels, y)}  # fmt: skip
    if task_type == "multi_label":
        chosen = (logits >= 0).astype(int)
        f1 = {f"eval_f1_{a}": metrics.f1_score(labels, chosen, average=a, zero_division=0) for a in ("micro", "macro")}
        return {**f1, "eval_exact_match": metrics.accuracy_score(labels, chosen)}
    return {"eval_accuracy": metrics.accuracy_score(labels, logits.argmax(axis=1))}


CASES = [
    ("bert", "single_label", True, "packed"),
    pytest.param("roberta", "regression", True, "packed", marks=pytest.mark.slow),
    ("roformer", "multi_label", True, "eager"),
    ("distilbert", "regression", False, "packed"),
]


@pytest.mark.parametrize(("kind", "task_type", "pairs", "attention"), CASES, ids=lambda value: str(value))
def test_every_step_and_the_evaluation_are_those_of_the_plain_loop(tmp_path, kind, task_type, pairs, attention):
    built, folder, train, test = built_for(tmp_path, kind, task_type, pairs=pairs)
    state = {name: tensor.clone() for name, tensor in built.model.state_dict().items()}
    schedule = built.trainer.plan.schedule
    batches = [[train[d] for m in schedule.step(n).microbatches for d in m.documents] for n in range(STEPS)]
    assert min(len(schedule.step(n).microbatches) for n in range(STEPS)) > 1
    has_types = kind in ("bert", "roformer")
    assert ("token_type_ids" in built.tokenizer.model_input_names) == has_types
    assert ("first_type_tokens" in built.trainer.plan.documents.documents.columns) == (pairs and has_types)
    assert built.trainer.plan.task.attention == attention
    built.train()
    found = built.trainer.evaluate()
    stock = Stock(folder, task_type, state)
    losses, norms = stock.train(batches)
    assert [line["loss"] for line in built.steps] == pytest.approx(losses, rel=1e-5)
    assert [line["grad_norm"] for line in built.steps] == pytest.approx(norms, rel=1e-5)
    loss, logits = stock.evaluate(test)
    assert found["eval_loss"] == pytest.approx(loss, rel=1e-5)
    labels = labels_of(test, task_type).numpy()
    for name, value in expected_metrics(task_type, labels, logits).items():
        assert found[name] == pytest.approx(value, rel=1e-4), name
    cut = built.trainer.plan.documents.table.counts["cut"]
    assert cut > 0 or not pairs, "some pairs are longer than the room"


@pytest.mark.parametrize("weights", [pytest.param("balanced", marks=pytest.mark.slow), [0.5, 3.0, 1.0, 7.0]], ids=str)
def test_weights_of_labels_are_torchs_pos_weight_over_the_whole_global_batch(tmp_path, capsys, weights):
    built, folder, train, test = built_for(tmp_path, "bert", "multi_label", pairs=False, class_weights=weights)
    expected = weights
    if weights == "balanced":
        having = np.array([[name in row["label"] for name in NAMES] for row in train]).sum(axis=0)
        expected = (len(train) - having) / having
    assert f"{NAMES[0]} {expected[0]:.4g}" in capsys.readouterr().out
    stock = Stock(folder, "multi_label", {name: own.clone() for name, own in built.model.state_dict().items()})
    stock.weights = torch.tensor(expected, dtype=torch.float32)
    schedule = built.trainer.plan.schedule
    built.train()
    losses, norms = stock.train(
        [[train[d] for m in schedule.step(n).microbatches for d in m.documents] for n in range(STEPS)]
    )
    assert [line["loss"] for line in built.steps] == pytest.approx(losses, rel=1e-5)
    assert [line["grad_norm"] for line in built.steps] == pytest.approx(norms, rel=1e-5)
    assert built.trainer.evaluate()["eval_loss"] == pytest.approx(stock.evaluate(test)[0], rel=1e-5)  # without weights


def test_the_predictions_file_names_labels_and_numbers(tmp_path):
    built, _, _, test = built_for(tmp_path, "bert", "multi_label", pairs=False)
    built.train()
    (file,) = built.run.path.glob("eval/*/predictions.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["label_names"] for line in lines] == [row["label"] for row in test]
    for line in lines:
        assert line["prediction"] == [k for k, p in enumerate(line["probabilities"]) if p >= 0.5]
        assert line["prediction_names"] == [NAMES[k] for k in line["prediction"]]


@pytest.mark.slow
@pytest.mark.parametrize("task_type", ["single_label", "multi_label", "regression"])
def test_the_score_of_the_plain_loop_lies_within_the_interval_of_ours(tmp_path, task_type):
    """With dropout, whose masks differ, and so many steps that something is learnt."""
    steps, rate, length = 80, 2e-3, 64
    folder = pair_encoder(tmp_path / "model", "bert")
    train, test = rows_of(task_type, 300), rows_of(task_type, 150, seed=1)
    files = [write_rows(tmp_path / f"{name}.jsonl", rows) for name, rows in (("train", train), ("test", test))]
    built = build_classifier(
        tmp_path, model_name_or_path=folder, dataset_name=files[0], eval_dataset_name=files[1], max_seq_length=length,
        lr_scheduler_type="constant", weight_decay=0.0, microbatch_tokens=1024, eval_microbatch_tokens=1024,
        max_steps=steps, global_batch_size=16, learning_rate=rate, eval_steps=steps,
    )  # fmt: skip
    state = {name: tensor.clone() for name, tensor in built.model.state_dict().items()}
    stock = Stock(folder, task_type, state, rate, length)
    schedule = built.trainer.plan.schedule
    stock.train([[train[d] for m in schedule.step(n).microbatches for d in m.documents] for n in range(steps)])
    built.train()
    (file,) = built.run.path.glob("eval/*/predictions.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    labels = labels_of(test, task_type).numpy()
    ours = np.array([line["prediction" if task_type == "regression" else "probabilities"] for line in lines])
    logits = stock.evaluate(test)[1].astype(np.float64)
    theirs = {"single_label": softmax(logits, axis=1), "multi_label": expit(logits), "regression": logits[:, 0]}
    name = {"single_label": "accuracy", "multi_label": "f1_micro", "regression": "pearson"}[task_type]
    of_ours, of_theirs = (statistics_of(task_type, labels, outputs) for outputs in (ours, theirs[task_type]))
    low, high = score(of_ours, len(test), only=[name]).intervals[name]
    assert low <= score(of_theirs, len(test), only=[name], resamples=10).metrics[name] <= high
