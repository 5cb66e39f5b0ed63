"""train/prompts.py on real prompts: true against predicted, the verdict on chance, and a control that finds leaks."""

import json

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from tests.building import Built, build_classifier
from tests.launching import TINY_CLASSIFIER, Finished, start

from isotune.evaluation.classification.chance_test import write_chance_test
from isotune.evaluation.results import read_result
from isotune.evaluation.samples import read_samples
from isotune.io.errors import RunFault
from isotune.projects.prompts import KINDS
from isotune.report.html_report import render_report

SENTENCES = ["Act as a guide.", "Is it late?", "The museum opens at nine."]
TRUE = ["command", "question", "statement"]


def prompts_recipe(shared_data, **values) -> dict:
    recipe = {**TINY_CLASSIFIER, "dataset_name": str(shared_data / "prompts" / "prompts.csv")}
    recipe |= {"dataset_text_field": "prompt", "label_source": "rules", "eval_split_share": 0.1, "max_steps": -1}
    recipe |= {"global_batch_size": 16, "num_train_epochs": 3, "microbatch_tokens": 1024}
    recipe |= {"eval_strategy": "epoch", "save_strategy": "epoch", "save_total_limit": 1}
    recipe |= {"load_best_model_at_end": True, "sentences": SENTENCES, "eval_dataset_name": None}
    return recipe | values


@pytest.fixture(scope="module")
def by_rules(tmp_path_factory, shared_data) -> Finished:
    folder = tmp_path_factory.mktemp("rules")
    return start(folder, prompts_recipe(shared_data), "--sentences", *SENTENCES[:2], script="train/prompts.py")


@pytest.fixture(scope="module")
def leaking(tmp_path_factory, shared_data) -> Finished:
    """A control whose evaluation rows all stand in training, trained until it knows them by heart."""
    folder = tmp_path_factory.mktemp("leaking")
    rows = (shared_data / "prompts" / "prompts.csv").read_text("utf-8").splitlines()[:41]
    (folder / "some.csv").write_text("\n".join(rows), "utf-8")
    some = {"dataset_name": str(folder / "some.csv"), "eval_dataset_name": str(folder / "some.csv")}
    long = {"num_train_epochs": 40, "learning_rate": 3e-3, "lr_scheduler_type": "constant", "save_strategy": "no"}
    long |= {"eval_strategy": "steps", "eval_steps": 60}  # 3 steps an epoch
    recipe = prompts_recipe(shared_data, label_source="random", **some, **long)
    for name in ("eval_split_share", "save_total_limit", "load_best_model_at_end"):
        del recipe[name]
    return start(folder, recipe, script="train/prompts.py", expect=1)


def test_each_epoch_is_evaluated_and_the_best_of_one_checkpoint_is_kept(by_rules):
    assert [line["step"] for line in by_rules.evaluations] == [9, 18, 27]
    assert len(list((by_rules.run / "checkpoints").glob("step-*"))) == 1
    held = {line["eval_documents"] for line in by_rules.evaluations}
    assert held == {153 - sum(line["documents"] for line in by_rules.steps if line["epoch"] <= 1)}


def test_given_sentences_are_shown_true_against_predicted(by_rules):
    lines = by_rules.stdout.splitlines()
    for sentence, true in zip(SENTENCES[:2], TRUE, strict=False):
        (line,) = [line for line in lines if line.endswith(sentence)]
        said, predicted, probability = line.lstrip("x ").split()[:3]
        assert said == true and predicted in KINDS and 1 / 3 <= float(probability) <= 1
        assert line.startswith("x") == (said != predicted)
        kept = {"input": sentence, "output": predicted, "probability": probability, "true": true}
        assert kept in read_samples(by_rules.run)
    assert not any(SENTENCES[2] in line for line in lines)  # the flag wins over the recipe


def test_the_saved_model_names_its_classes(by_rules):
    config = json.loads((by_rules.run / "model" / "config.json").read_text())
    assert [config["id2label"][str(k)] for k in range(3)] == list(KINDS)


def test_the_verdict_compares_the_last_evaluation_with_the_commonest_class(by_rules):
    found = read_result(by_rules.run / "eval" / "chance")
    labels = [row["label"] for row in found.predictions]
    assert found.metrics["chance"] == max(labels.count(k) for k in set(labels)) / len(labels)
    assert found.metrics["accuracy"] == pytest.approx(by_rules.evaluations[-1]["eval_accuracy"])
    assert found.facts["judged"] == "step-00000027" and found.facts["alarm"] is None
    assert f"verdict     accuracy {found.metrics['accuracy']:.3f}" in by_rules.stdout
    assert {row["id"] for row in found.predictions} < set(range(153))


def test_the_run_has_a_model_card(by_rules):
    card = ModelCard.load(by_rules.run / "model" / "README.md")
    assert card.data.eval_results and "model card" in by_rules.stdout


def test_random_labels_are_found_not_different_from_chance(tmp_path, shared_data):
    built = build_classifier(tmp_path, **prompts_recipe(shared_data, label_source="random", num_train_epochs=1))
    built.train()
    verdict = judge(built)
    low, high = verdict.interval
    assert not verdict.differs and low <= 0.5 <= high and verdict.chance == 0.5
    found = read_result(tmp_path / "run" / "eval" / "chance")
    assert "not different from chance" in found.facts["verdict"] and found.facts["alarm"] is None
    assert found.intervals["accuracy"] == verdict.interval
    page = render_report([tmp_path / "run"])
    assert str(verdict) in page and "ALARM" not in page


def test_evaluation_rows_in_training_raise_the_alarm(leaking):
    (said,) = [line for line in leaking.stderr.splitlines() if "negative control" in line]
    assert "raises the alarm" in said and "better" in said and "Traceback" not in leaking.stderr
    status = json.loads((leaking.run / "status.json").read_text())
    assert (status["status"], status["exit_status"]) == ("failed", 1) and "alarm" in status["message"]
    found = read_result(leaking.run / "eval" / "chance")
    assert "not different" not in found.facts["verdict"] and found.facts["alarm"] == "the pipeline leaks"
    assert found.metrics["accuracy"] > 0.9 and (leaking.run / "model" / "model.safetensors").is_file()
    assert "exactly in the other data too" in leaking.stdout
    assert "ALARM, the pipeline leaks: accuracy" in render_report([leaking.run])


def test_a_restart_repeats_the_alarm_instead_of_calling_the_run_finished(leaking):
    recipe = yaml.safe_load((leaking.run.parent / "recipe.yaml").read_text())
    again = start(leaking.run.parent, recipe, script="train/prompts.py", expect=1)
    (said,) = [line for line in again.stderr.splitlines() if "negative control" in line]
    assert "failed at its end" in said and "Traceback" not in again.stderr


def test_labels_made_from_texts_raise_the_alarm(tmp_path, monkeypatch):
    def looks(texts, settings):
        return np.array([text.startswith("yes") for text in texts], np.int32)

    monkeypatch.setattr("isotune.data.classification.reading.labels_of", looks)
    rows = [{"text": f"{('no', 'yes')[number % 2]} {number}"} for number in range(300)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    built = build_classifier(
        tmp_path, dataset_name=str(tmp_path / "rows.jsonl"), eval_dataset_name=None, eval_split_share=0.2,
        label_source="random", max_steps=30, global_batch_size=16, learning_rate=3e-3, save_strategy="no",
    )  # fmt: skip
    built.train()
    with pytest.raises(RunFault, match=r"labels are random, and yet accuracy .* different from chance \(0\.500\)"):
        judge(built)


def judge(built: Built):
    return write_chance_test(built.run.path, built.recipe, built.trainer.plan.evaluation)
