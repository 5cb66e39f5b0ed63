"""The judge of classification: a plain loop over padded batches, which knows nothing of plans, rows or packing."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics
from sklearn.metrics import f1_score
from sklearn.utils.class_weight import compute_class_weight
from tests.building import Built, build_classifier, small_encoder
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from isotune.data.sources.source import find_corpus

STEPS, WARMUP, BATCH, RATE, DECAY = 6, 2, 7, 1e-3, 0.01
NO_DROPOUT = {
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "roberta": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "albert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout_prob": 0.0},
    "distilbert": {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0},
    "electra": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    # its attention cannot be replaced: it must say so, and pad
    "mpnet": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}


@dataclass
class Found:
    """What the naive loop finds: loss, gradient norm and accuracy of each step, and the accuracy on the test rows."""

    losses: list[float]
    norms: list[float]
    accuracies: list[float]
    test_accuracy: float


def naive_loop(folder: str, batches: list[list[dict]], test: list[dict], state: dict, **loss: Any) -> Found:
    """Train on `batches` by torch's cross-entropy with the further arguments `loss`, and evaluate on `test`."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    model.load_state_dict(state)
    decayed = [p for n, p in model.named_parameters() if "bias" not in n and "LayerNorm" not in n and "norm" not in n]
    others = [p for p in model.parameters() if not any(p is d for d in decayed)]
    groups = [{"params": decayed, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: step / WARMUP if step < WARMUP else (STEPS - step) / (STEPS - WARMUP)
    )

    def padded(rows: list[dict]) -> dict:
        texts = [row["text"] for row in rows]
        return tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")

    found = Found([], [], [], 0.0)
    model.train()
    for rows in batches:
        labels = torch.tensor([row["label"] for row in rows])
        logits = model(**padded(rows)).logits
        mean = nn.functional.cross_entropy(logits, labels, **loss)
        optimizer.zero_grad()
        mean.backward()
        found.norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        optimizer.step()
        schedule.step()
        found.losses.append(mean.item())
        step_accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=3)
        found.accuracies.append(float(step_accuracy(logits, labels)))
    accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=3)
    model.eval()
    with torch.no_grad():
        for start in range(0, len(test), 16):
            rows = test[start : start + 16]
            accuracy.update(model(**padded(rows)).logits, torch.tensor([row["label"] for row in rows]))
    found.test_accuracy = float(accuracy.compute())
    return found


def run_and_judge(tmp_path, kind: str, train: list[dict], judge: dict[str, Any], **values: Any) -> tuple[Built, dict]:
    """Train on `train` unpadded, hold every step to the naive loop, and return the run with its last evaluation."""
    folder = small_encoder(tmp_path / "model", kind, **NO_DROPOUT[kind])
    built = build_classifier(
        tmp_path, model_name_or_path=folder, max_steps=STEPS, warmup_steps=WARMUP, global_batch_size=BATCH,
        learning_rate=RATE, weight_decay=DECAY, optim="adamw_torch", **values,
    )  # fmt: skip
    state = {name: tensor.clone() for name, tensor in built.model.state_dict().items()}
    schedule = built.trainer.plan.schedule
    batches = [[train[d] for m in schedule.step(n).microbatches for d in m.documents] for n in range(STEPS)]
    assert min(len(schedule.step(n).microbatches) for n in range(STEPS)) > 1
    built.train()
    found = built.trainer.evaluate()
    test = find_corpus("builtin:opinions").rows("test")
    naive = naive_loop(folder, batches, test, state, **judge)
    assert [line["loss"] for line in built.steps] == pytest.approx(naive.losses, rel=1e-5)
    assert [line["grad_norm"] for line in built.steps] == pytest.approx(naive.norms, rel=1e-5)
    assert [line["accuracy"] for line in built.steps] == pytest.approx(naive.accuracies, abs=1e-7)
    assert found["eval_accuracy"] == pytest.approx(naive.test_accuracy, abs=1e-7)  # torchmetrics computes in fp32
    assert found["eval_documents"] == len(test)
    return built, found


IN_SHORT = ("bert", "mpnet")  # the last is padded


@pytest.mark.parametrize(
    "kind", [kind if kind in IN_SHORT else pytest.param(kind, marks=pytest.mark.slow) for kind in NO_DROPOUT]
)
def test_an_unpadded_run_is_the_plain_padded_loop(tmp_path, capsys, kind):
    built, _ = run_and_judge(tmp_path, kind, find_corpus("builtin:opinions").rows("train"), {})
    padded = "texts are padded, as model type 'mpnet' cannot be packed" in capsys.readouterr().out
    assert padded == (kind == "mpnet")
    assert built.trainer.plan.task.attention == ("eager" if kind == "mpnet" else "packed")


def uneven_rows(folder: Path) -> list[dict]:
    """The opinions with two of three rows of class 0 and one of three of class 1 left out, in a file in `folder`."""
    rows = find_corpus("builtin:opinions").rows("train")
    kept = [row for number, row in enumerate(rows) if number // 3 % 3 >= 2 - row["label"]]
    (folder / "uneven.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    return kept


@pytest.mark.parametrize(
    ("class_weights", "smoothing"),
    [
        ("balanced", 0.1),
        pytest.param([0.5, 4.0, 1.0], 0.0, marks=pytest.mark.slow),
        pytest.param(None, 0.3, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_weights_and_smoothing_are_torchs_over_the_whole_global_batch(tmp_path, class_weights, smoothing):
    rows = uneven_rows(tmp_path)
    labels = [row["label"] for row in rows]
    weights = class_weights
    if class_weights == "balanced":
        weights = compute_class_weight("balanced", classes=np.arange(3), y=labels)
        assert max(weights) > 2 * min(weights)
    judge = {"weight": None if weights is None else torch.tensor(weights, dtype=torch.float32)}
    values = {"class_weights": class_weights, "label_smoothing_factor": smoothing}
    file = str(tmp_path / "uneven.jsonl")
    judge["label_smoothing"] = smoothing
    built, found = run_and_judge(tmp_path, "bert", rows, judge, dataset_name=file, **values)
    # the evaluation's loss stays the plain one, so that runs of other weights compare
    assert found["eval_loss"] == pytest.approx(plain_loss(built), rel=1e-6)


def predictions(built: Built) -> list[dict]:
    """The lines of the last evaluation's predictions."""
    file = max(built.run.path.glob("eval/*/predictions.jsonl"))
    return [json.loads(line) for line in file.read_text().splitlines()]


def plain_loss(built: Built) -> float:
    """The mean of the labels' negative log probabilities, from the predictions of the last evaluation."""
    lines = predictions(built)
    return -sum(math.log(line["probabilities"][line["label"]]) for line in lines) / len(lines)


def test_predictions_are_one_a_row_with_its_id_and_add_up_to_the_loss_and_the_accuracy(tmp_path):
    built = build_classifier(tmp_path, max_steps=2)
    built.train()
    found = built.trainer.evaluate()
    lines = predictions(built)
    test = find_corpus("builtin:opinions").rows("test")
    assert [line["id"] for line in lines] == list(range(len(test)))
    assert [line["label"] for line in lines] == [row["label"] for row in test]
    correct = sum(line["prediction"] == line["label"] for line in lines)
    assert found["eval_accuracy"] == correct / len(test)
    labels, chosen = ([line[name] for line in lines] for name in ("label", "prediction"))
    assert found["eval_f1_macro"] == pytest.approx(f1_score(labels, chosen, average="macro"), rel=1e-12)
    assert found["eval_loss"] == pytest.approx(plain_loss(built), rel=1e-6)


def test_the_loss_does_not_depend_on_the_size_of_the_passes(tmp_path):
    small, large = (
        build_classifier(tmp_path / str(tokens), microbatch_tokens=tokens, max_steps=4) for tokens in (64, 512)
    )
    assert len(small.trainer.plan.schedule.step(0).microbatches) > len(large.trainer.plan.schedule.step(0).microbatches)
    a, b = small.train(), large.train()
    assert [x["loss"] for x in a if "loss" in x] == pytest.approx([x["loss"] for x in b if "loss" in x], rel=1e-5)
