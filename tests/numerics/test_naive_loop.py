"""The judge of classification: a plain loop over padded batches, which knows nothing of plans, rows or packing."""

import json
import math

import pytest
import torch
import torchmetrics
from tests.building import build_classifier, small_encoder
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from isotune.data.builtin import find_corpus

STEPS, WARMUP, BATCH, RATE, DECAY = 6, 2, 7, 1e-3, 0.01
NO_DROPOUT = {
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "roberta": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "albert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout_prob": 0.0},
    "distilbert": {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0},
    # not known to the packed path: it must say so, and pad
    "electra": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}


def naive_loop(folder: str, batches: list[list[dict]], test: list[dict], state: dict) -> tuple[list, list, float]:
    """Losses and gradient norms of the steps, and the accuracy on `test` at the end."""
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

    losses, norms = [], []
    model.train()
    for rows in batches:
        labels = torch.tensor([row["label"] for row in rows])
        loss = nn.functional.cross_entropy(model(**padded(rows)).logits, labels)
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=3)
    model.eval()
    with torch.no_grad():
        for start in range(0, len(test), 16):
            rows = test[start : start + 16]
            accuracy.update(model(**padded(rows)).logits, torch.tensor([row["label"] for row in rows]))
    return losses, norms, float(accuracy.compute())


@pytest.mark.parametrize("kind", NO_DROPOUT)
def test_an_unpadded_run_is_the_plain_padded_loop(tmp_path, capsys, kind):
    folder = small_encoder(tmp_path / "model", kind, **NO_DROPOUT[kind])
    built = build_classifier(
        tmp_path, model_name_or_path=folder, max_steps=STEPS, warmup_steps=WARMUP, global_batch_size=BATCH,
        learning_rate=RATE, weight_decay=DECAY, optim="adamw_torch",
    )  # fmt: skip
    state = {name: tensor.clone() for name, tensor in built.model.state_dict().items()}
    train, test = (find_corpus("builtin:opinions").rows(split) for split in ("train", "test"))
    plan = built.trainer.plan
    batches = [[train[d] for m in plan.step(n).microbatches for d in m.documents] for n in range(STEPS)]
    assert min(len(plan.step(n).microbatches) for n in range(STEPS)) > 1
    built.train()
    found = built.trainer.measure()

    losses, norms, accuracy = naive_loop(folder, batches, test, state)
    assert [line["loss"] for line in built.steps] == pytest.approx(losses, rel=1e-5)
    assert [line["grad_norm"] for line in built.steps] == pytest.approx(norms, rel=1e-5)
    assert found["eval_accuracy"] == pytest.approx(accuracy, abs=1e-7)  # torchmetrics computes in fp32
    assert found["eval_documents"] == len(test)
    padded = "is not known to work without padding: texts are padded" in capsys.readouterr().out
    assert padded == (kind == "electra")
    assert built.trainer.attention == ("sdpa" if kind == "electra" else "packed")


def test_predictions_are_one_a_row_with_its_id_and_add_up_to_the_loss_and_the_accuracy(tmp_path):
    built = build_classifier(tmp_path, max_steps=2)
    built.train()
    found = built.trainer.measure()
    file = tmp_path / "run" / "eval" / "step-00000002" / "predictions.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    test = find_corpus("builtin:opinions").rows("test")
    assert [line["id"] for line in lines] == list(range(len(test)))
    assert [line["label"] for line in lines] == [row["label"] for row in test]
    correct = sum(line["prediction"] == line["label"] for line in lines)
    assert found["eval_accuracy"] == correct / len(test)
    mean = -sum(math.log(line["probabilities"][line["label"]]) for line in lines) / len(test)
    assert found["eval_loss"] == pytest.approx(mean, rel=1e-6)


def test_the_loss_does_not_depend_on_the_size_of_the_passes(tmp_path):
    small, large = (
        build_classifier(tmp_path / str(tokens), microbatch_tokens=tokens, max_steps=4) for tokens in (64, 512)
    )
    assert len(small.trainer.plan.step(0).microbatches) > len(large.trainer.plan.step(0).microbatches)
    # dropout is drawn by pass, so it is turned off for this
    for built in (small, large):
        for module in built.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    a, b = small.train(), large.train()
    assert [x["loss"] for x in a if "loss" in x] == pytest.approx([x["loss"] for x in b if "loss" in x], rel=1e-5)
