"""Classification on other hardware: the same losses and exactly the same predictions, one a row."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.launching import TINY_CLASSIFIER, Finished, start_together

# dropout on (0.1 is BERT's own), and a global batch that two processes do not divide
COMMON = {**TINY_CLASSIFIER, "exact_gradients": True, "optim": "adamw_torch", "eval_steps": 3, "save_strategy": "no"}
RUNS = {"full": COMMON, "lora": {**COMMON, "tune": "lora", "learning_rate": 1e-2, "lora_dropout": 0.1}}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory) -> dict[str, Finished]:
    """Full and LoRA on one plain process."""
    return start_together(tmp_path_factory.mktemp("one"), RUNS, script="train/imdb.py")


def figures(finished: Finished) -> list[tuple]:
    return [(line["step"], line["loss"], line["grad_norm"], line["documents"]) for line in finished.steps]


def found(finished: Finished) -> list[tuple]:
    return [(line["step"], line["eval_loss"], line["eval_accuracy"]) for line in finished.evaluations]


def predictions(finished: Finished) -> list[list[dict]]:
    files = sorted((finished.run / "eval").glob("*/predictions.jsonl"))
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


@pytest.mark.parametrize("config", ["ddp.yaml", "zero2.yaml"])
def test_two_processes_give_the_same_losses_and_exactly_the_same_predictions(tmp_path: Path, one_process, config):
    for tune, two in start_together(tmp_path, RUNS, processes=2, config=config, script="train/imdb.py").items():
        one = one_process[tune]
        assert two.environment["world_size"] == 2
        assert two.environment["in_effect"]["zero_stage"] == (2 if config == "zero2.yaml" else None)
        assert [line["documents"] for line in two.steps] == [7] * 6
        assert figures(two) == figures(one)
        assert found(two) == found(one) and [step for step, *_ in found(two)] == [3, 6]
        assert predictions(two) == predictions(one)
        assert [[line["id"] for line in lines] for lines in predictions(two)] == [list(range(120))] * 2


def test_an_adapter_is_saved_with_its_trained_head_and_opens_in_stock_libraries(one_process):
    from peft import AutoPeftModelForSequenceClassification
    from transformers import AutoTokenizer

    from isotune.data.builtin import find_corpus

    run = one_process["lora"].run
    names = set(load_file(run / "model" / "adapter_model.safetensors"))
    assert any("classifier.weight" in name for name in names) and any("pooler.dense" in name for name in names)
    model = AutoPeftModelForSequenceClassification.from_pretrained(run / "model", num_labels=3).eval()
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    last = predictions(one_process["lora"])[-1]
    for line, row in list(zip(last, find_corpus("builtin:opinions").rows("test"), strict=True))[:20]:
        with torch.no_grad():
            inputs = tokenizer(row["text"], truncation=True, max_length=64, return_tensors="pt")
            shares = model(**inputs).logits.softmax(dim=1)[0]
        assert shares.tolist() == pytest.approx(line["probabilities"], abs=1e-5)
