"""What a user types to train a classifier, on real reviews, and what is said to a user who mistypes."""

import json

import pytest
from tests.building import build_classifier
from tests.launching import TINY_CLASSIFIER, start

SCRIPT = "train/imdb.py"


def test_real_reviews_are_trained_on_whole_or_cut_as_asked_and_every_one_is_predicted(tmp_path, shared_data):
    from isotune.models.opening import load_tokenizer

    data = {}
    for split, count in (("train", 60), ("test", 20)):
        lines = (shared_data / "imdb" / f"{split}.jsonl").open(encoding="utf-8").readlines()
        data[split] = [json.loads(line) for line in lines[:count]]
        (tmp_path / f"{split}.jsonl").write_text("".join(lines[:count]), encoding="utf-8")
    built = build_classifier(
        tmp_path, dataset_name=str(tmp_path), eval_dataset_name=str(tmp_path), max_seq_length=256, num_labels=2,
        microbatch_tokens=1024, overlong="head_tail", max_steps=-1, num_train_epochs=1, global_batch_size=16,
    )  # fmt: skip
    lines = built.train()
    assert [line["documents"] for line in built.steps] == [16, 16, 16, 12]
    (evaluation,) = [line for line in lines if "eval_loss" in line]
    assert evaluation["eval_documents"] == 20 and 0 <= evaluation["eval_accuracy"] <= 1
    tokenizer = load_tokenizer(built.recipe, needed=("pad",))
    lengths = [len(tokenizer(row["text"])["input_ids"]) for row in data["train"]]
    assert sum(line["input_tokens"] for line in built.steps) == sum(min(length, 256) for length in lengths)
    file = tmp_path / "run" / "eval" / "step-00000004" / "predictions.jsonl"
    predictions = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["label"] for line in predictions] == [row["label"] for row in data["test"]]


@pytest.fixture(scope="module")
def mistaken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistaken")
    rows = [{"text": "one", "label": 0}, {"text": "two", "label": 3}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {**TINY_CLASSIFIER, "dataset_name": str(folder / "rows.jsonl"), "num_labels": 2}
    return start(folder, recipe, script=SCRIPT, expect=2)


def test_data_that_does_not_fit_the_recipe_is_one_sentence_and_nothing_is_written(mistaken):
    (line,) = [line for line in mistaken.stderr.splitlines() if "num_labels" in line]
    assert "row 2 of" in line and "rows.jsonl is of class 3, and num_labels is 2: 0 to 1" in line
    assert "Traceback" not in mistaken.stderr and not mistaken.run.exists()


@pytest.mark.parametrize("tune", [pytest.param("full", marks=pytest.mark.slow), "lora"])
def test_a_run_goes_on_from_a_checkpoint_with_the_same_steps_and_the_same_predictions(tmp_path, tune):
    values = {"tune": tune, "save_steps": 3, "eval_steps": 3, "exact_gradients": True}
    whole = build_classifier(tmp_path / "whole", **values)
    whole.train()
    checkpoint = tmp_path / "whole" / "run" / "checkpoints" / "step-00000003"
    rest = build_classifier(tmp_path / "rest", resume=str(checkpoint), **values)
    rest.train()
    told = ("step", "loss", "grad_norm", "learning_rate")
    assert [[line[k] for k in told] for line in rest.steps] == [[line[k] for k in told] for line in whole.steps]
    last = [run.run.path / "eval" / "step-00000006" / "predictions.jsonl" for run in (whole, rest)]
    assert last[0].read_bytes() == last[1].read_bytes()
