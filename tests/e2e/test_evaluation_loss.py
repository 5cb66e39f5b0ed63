"""The evaluation loss is the mean over supervised tokens, whatever the evaluation batch, packed or not."""

import json
import math
from pathlib import Path

import pytest
import torch
from tests.building import Built, build, each_document, loss_of_document, small_opt
from transformers import AutoModelForCausalLM

# answers of very different lengths, so that a mean of means is another number
CORPUS = [
    "### Human: Count.\n### Assistant: " + " ".join(map(str, range(n))) + f"\n### Human: And?\n### Assistant: {n}"
    for n in (1, 40, 2, 3, 25, 1, 5, 33, 2, 12, 4, 7)
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("corpus") / "counting.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in CORPUS))
    return str(file)


def built(folder: Path, corpus: str, **values) -> Built:
    model = {"model_name_or_path": small_opt(folder / "opt", dropout=0.1), "max_seq_length": 128}
    return build(folder, **model, dataset_name=corpus, eval_dataset_name=corpus, **values)


def test_it_equals_a_loop_of_plain_forwards_over_single_documents(tmp_path, corpus):
    one = built(tmp_path, corpus)
    plain = AutoModelForCausalLM.from_pretrained(one.recipe.model_name_or_path, attn_implementation="eager").eval()
    losses, counts = [], []
    with torch.no_grad():
        for ids, supervised in each_document(one.trainer.plan.evaluation.documents):
            losses.append(loss_of_document(plain, ids, supervised).item())
            counts.append(int(supervised.sum()))
    one.trainer.model.train()
    found = one.trainer.evaluate()
    assert found["eval_loss"] == pytest.approx(sum(losses) / sum(counts), rel=1e-6)
    assert found["eval_perplexity"] == pytest.approx(math.exp(sum(losses) / sum(counts)), rel=1e-5)
    assert found["eval_supervised_tokens"] == sum(counts)
    mean_of_means = sum(loss / count for loss, count in zip(losses, counts, strict=True)) / len(losses)
    assert found["eval_loss"] != pytest.approx(mean_of_means, rel=1e-3), "the corpus tells the two apart"
    assert one.trainer.model.training, "training goes on as it was"


def test_it_does_not_depend_on_the_evaluation_batch_nor_on_packing(tmp_path, corpus):
    sizes = [{"eval_microbatch_tokens": n} for n in (128, 200, 500, 4000)]
    variants = [*sizes, {"packing": False}, {"packing": False, "eval_microbatch_tokens": 1000}]
    found = [built(tmp_path / str(i), corpus, **v).trainer.evaluate() for i, v in enumerate(variants)]
    assert len({f["eval_supervised_tokens"] for f in found}) == 1
    for one in found[1:]:
        assert one["eval_loss"] == pytest.approx(found[0]["eval_loss"], rel=1e-6)


def test_the_metrics_file_holds_an_evaluation_at_each_of_eval_steps_and_at_the_end(tmp_path, corpus):
    lines = built(tmp_path, corpus, eval_steps=2, max_steps=5).train()
    evaluations = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in evaluations] == [2, 4, 5]
    keys = {"step", "epoch", "eval_loss", "eval_perplexity", "eval_supervised_tokens", "eval_seconds"}
    assert all(line.keys() == keys for line in evaluations)
    assert evaluations[-1]["eval_loss"] < evaluations[0]["eval_loss"]
