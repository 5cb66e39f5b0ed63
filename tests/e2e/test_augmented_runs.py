"""Runs with augmented training texts: the same after a resume, said and recorded, and without rates as they were."""

import json
import random

import pytest
import torch
from safetensors.torch import load_file
from tests.building import Built, build_classifier

from isotune.config import ClassificationRecipe
from isotune.report.html_report import render_report

RATES = {"augment_word_dropout": 0.2, "augment_word_swap": 0.2, "augment_synonym_rate": 0.5}
TOLD = ("step", "loss", "grad_norm", "accuracy", "input_tokens")
WORDS = ["good", "bad", "fine", "poor", "film", "plot", "cast", "scene", "slow", "quick", "warm", "cold"]


@pytest.fixture(scope="module")
def values(tmp_path_factory) -> dict:
    """A recipe of two epochs of four steps, the second of which begins in the middle of nothing."""
    folder, generator = tmp_path_factory.mktemp("data"), random.Random(3)
    rows = [{"text": " ".join(generator.choices(WORDS, k=4 + number % 9)), "label": number % 3} for number in range(26)]
    for name, part in (("train", rows), ("test", rows[:9])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    (folder / "table.json").write_text(json.dumps({"good": ["great", "nice"], "film": ["movie"]}))
    return {
        "dataset_name": str(folder / "train.jsonl"), "eval_dataset_name": str(folder / "test.jsonl"), "max_steps": -1,
        "num_train_epochs": 2, "global_batch_size": 7, "exact_gradients": True, "save_steps": 5, "eval_steps": 4,
        "augment_synonyms": str(folder / "table.json"),
    }  # fmt: skip


def without(values: dict, *names: str) -> dict:
    return {name: value for name, value in values.items() if name not in names}


def trained(folder, **values) -> tuple[Built, list[list]]:
    built = build_classifier(folder, **values)
    built.train()
    return built, [[line[name] for name in TOLD] for line in built.steps]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, values) -> tuple[Built, list[list]]:
    return trained(tmp_path_factory.mktemp("whole"), **values, **RATES)


def weights_of(built: Built) -> dict[str, torch.Tensor]:
    files = (built.run.path / "checkpoints" / "step-00000008").rglob("*.safetensors")
    return {name: value for file in sorted(files) for name, value in load_file(file).items()}


def test_a_run_that_goes_on_in_its_second_epoch_ends_with_the_same_bits(tmp_path, values, whole):
    built, steps = whole
    checkpoint = built.run.path / "checkpoints" / "step-00000005"
    rest, rest_of_steps = trained(tmp_path, **values, **RATES, resume=str(checkpoint))
    assert len(steps) == 8 and rest_of_steps == steps
    last = [run.run.path / "eval" / "step-00000008" / "predictions.jsonl" for run in (built, rest)]
    assert last[0].read_bytes() == last[1].read_bytes()
    tensors, same = weights_of(built), weights_of(rest)
    assert tensors and tensors.keys() == same.keys() and all(torch.equal(tensors[name], same[name]) for name in same)


def test_rates_of_zero_train_with_the_bits_of_a_run_without_the_keys_and_others_do_not(tmp_path, values, whole):
    plain = without(values, "augment_synonyms")
    built, steps = trained(tmp_path / "plain", **plain)
    zeros, same = trained(tmp_path / "zeros", **plain, augment_word_dropout=0, augment_word_swap=0.0)
    assert same == steps and built.recipe.fingerprint() == zeros.recipe.fingerprint()
    tensors, others = weights_of(built), weights_of(zeros)
    assert tensors and all(torch.equal(tensors[name], others[name]) for name in tensors)
    assert all(other[-1] != step[-1] for other, step in zip(whole[1], steps, strict=True))
    documents = [run.trainer.plan.evaluation for run in (built, whole[0])]
    assert documents[0].fingerprint == documents[1].fingerprint


def test_what_was_done_is_said_recorded_and_shown_in_the_report(tmp_path, values, capsys):
    built = build_classifier(tmp_path, **values, **RATES)
    said = capsys.readouterr().out
    built.train()
    environment = json.loads((built.run.path / "environment.json").read_text())
    counted = environment["data"]["train"]["augmented"]
    assert (counted["epochs"], counted["texts"]) == (2, 52) and "augmented" not in environment["data"]["evaluation"]
    assert min(counted["replaced"], counted["swapped"], counted["dropped"]) > 5
    assert "2 epochs, each with texts of its own" in said and f"{counted['dropped']:,} (" in said
    page = render_report([built.run.path])
    assert "One training text, augmented" in page
    assert counted["example"]["text"] in page and counted["example"]["augmented"] in page
    assert page.count(counted["example"]["text"]) == 1  # not in the table of counts too
    written = ClassificationRecipe.from_values(**{**values, **RATES, "model_name_or_path": "builtin:bert-tiny",
                                                  "output_dir": "x"}).as_yaml()  # fmt: skip
    assert "augment_word_dropout: 0.2" in written
