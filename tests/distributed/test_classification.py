"""Classification on other hardware: the same losses and exactly the same predictions, one a row."""

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.launching import TINY_CLASSIFIER, Finished, start_together

# dropout on (0.1 is BERT's own), and a global batch that two processes do not divide
COMMON = {**TINY_CLASSIFIER, "exact_gradients": True, "optim": "adamw_torch", "eval_steps": 3, "save_strategy": "no"}
LORA = {"tune": "lora", "learning_rate": 1e-2, "lora_dropout": 0.1}
WEIGHTED = {"class_weights": [0.5, 3.0, 1.0], "label_smoothing_factor": 0.1}
AUGMENTED = {"augment_word_dropout": 0.2, "augment_word_swap": 0.2}
RUNS = {"full": COMMON, "lora": {**COMMON, **LORA, **WEIGHTED}, "augmented": {**COMMON, **AUGMENTED}}


ALL = tuple(RUNS)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory) -> Callable[[Sequence[str]], dict[str, Finished]]:
    """The runs of these names on one plain process."""

    def runs(names: Sequence[str]) -> dict[str, Finished]:
        recipes = {name: RUNS[name] for name in names}
        return start_together(tmp_path_factory.mktemp("one"), recipes, script="train/imdb.py")

    return functools.cache(runs)


def figures(finished: Finished) -> list[tuple]:
    return [
        (line["step"], line["loss"], line["accuracy"], line["grad_norm"], line["documents"]) for line in finished.steps
    ]


def found(finished: Finished) -> list[tuple]:
    names = ("step", "eval_loss", "eval_accuracy", "eval_f1_macro", "train_loss", "train_accuracy")
    return [tuple(line[name] for name in names) for line in finished.evaluations]


def predictions(finished: Finished) -> list[list[dict]]:
    files = sorted((finished.run / "eval").glob("*/predictions.jsonl"))
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


@pytest.mark.parametrize(
    ("config", "processes", "names"),
    [
        ("ddp.yaml", 2, ("lora",)),  # with adapters and the whole head, weights of classes and dropout
        pytest.param("ddp.yaml", 2, ALL, marks=pytest.mark.slow),
        pytest.param("zero2.yaml", 2, ALL, marks=pytest.mark.slow),
        pytest.param("ddp.yaml", 3, ALL, marks=pytest.mark.slow),
        pytest.param("zero2.yaml", 3, ALL, marks=pytest.mark.slow),
    ],
)
def test_several_processes_give_the_same_losses_and_exactly_the_same_predictions(
    tmp_path: Path, one_process, config, processes, names
):
    recipes = {name: RUNS[name] for name in names}
    started = start_together(tmp_path, recipes, processes=processes, config=config, script="train/imdb.py")
    for tune, several in started.items():
        one = one_process(names)[tune]
        assert several.environment["world_size"] == processes
        assert several.environment["in_effect"]["zero_stage"] == (2 if config == "zero2.yaml" else None)
        assert [line["documents"] for line in several.steps] == [7] * 6
        assert figures(several) == figures(one)
        assert found(several) == found(one) and [step for step, *_ in found(several)] == [3, 6]
        assert predictions(several) == predictions(one)
        assert [[line["id"] for line in lines] for lines in predictions(several)] == [list(range(120))] * 2


@pytest.mark.parametrize(
    ("config", "processes"),
    [
        pytest.param("zero3.yaml", 2, marks=pytest.mark.slow),
        pytest.param("fsdp2.yaml", 2, marks=pytest.mark.slow),
        pytest.param("zero3.yaml", 3, marks=pytest.mark.slow),
        pytest.param("fsdp2.yaml", 3, marks=pytest.mark.slow),
    ],
)
def test_where_weights_are_shared_out_losses_agree_to_rounding_and_every_row_is_predicted_alike(
    tmp_path: Path, one_process, config, processes
):
    runs = {tune: {**recipe, "exact_gradients": False} for tune, recipe in RUNS.items()}
    started = start_together(tmp_path, runs, processes=processes, config=config, script="train/imdb.py")
    for tune, several in started.items():
        one = one_process(ALL)[tune]
        in_effect = several.environment["in_effect"]
        assert (several.environment["world_size"], in_effect["exact_gradients"]) == (processes, False)
        assert (in_effect["kind"], in_effect["zero_stage"]) == (
            ("DeepSpeed", 3) if config == "zero3.yaml" else ("FSDP", None)
        )
        for ours, theirs in zip(several.steps, one.steps, strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
            assert (ours["accuracy"], ours["documents"]) == (theirs["accuracy"], theirs["documents"])
        assert [line["grad_norm"] for line in several.steps[:3]] == pytest.approx(
            [line["grad_norm"] for line in one.steps[:3]], rel=1e-5
        )
        for ours, theirs in zip(found(several), found(one), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)
        for ours, theirs in zip(predictions(several), predictions(one), strict=True):
            assert [(row["id"], row["label"], row["prediction"]) for row in ours] == [
                (row["id"], row["label"], row["prediction"]) for row in theirs
            ]
            for mine, other in zip(ours, theirs, strict=True):
                assert mine["probabilities"] == pytest.approx(other["probabilities"], abs=1e-5)


def test_an_adapter_is_saved_with_its_trained_head_and_opens_in_stock_libraries(one_process):
    from peft import AutoPeftModelForSequenceClassification
    from transformers import AutoTokenizer

    from isotune.data.sources.source import find_corpus

    one = one_process(("lora",))["lora"]
    run = one.run
    names = set(load_file(run / "model" / "adapter_model.safetensors"))
    assert any("classifier.weight" in name for name in names) and any("pooler.dense" in name for name in names)
    model = AutoPeftModelForSequenceClassification.from_pretrained(run / "model", num_labels=3).eval()
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    last = predictions(one)[-1]
    for line, row in list(zip(last, find_corpus("builtin:opinions").rows("test"), strict=True))[:20]:
        with torch.no_grad():
            inputs = tokenizer(row["text"], truncation=True, max_length=64, return_tensors="pt")
            shares = model(**inputs).logits.softmax(dim=1)[0]
        assert shares.tolist() == pytest.approx(line["probabilities"], abs=1e-5)
