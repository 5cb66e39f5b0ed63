"""eval/classify.py: the numbers are those of a plain loop, whatever the batches, and a mistake is one sentence."""

import importlib.util
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn import metrics as theirs
from tests.building import build_classifier, small_encoder, small_opt

from isotune.evaluation.results import read_result
from isotune.io.errors import run_script
from isotune.training.from_recipe import save

ROWS = 41  # neither 2, 3, 7 nor 64 divide it


class Runs(dict[str, Path]):
    """Finished runs: full, LoRA and LoRA on a decoder, a few steps on builtin:opinions, made where they are asked for.

    `folder` makes one by a name.
    """

    def __init__(self, folder: Callable[[str], Path]) -> None:
        super().__init__()
        self.folder = folder

    def __missing__(self, name: str) -> Path:
        folder = self.folder(name)
        more = {"model_name_or_path": small_opt(folder / "opt")} if name == "decoder" else {}
        more |= {"tune": "full" if name == "full" else "lora", "microbatch_tokens": 1024}
        built = build_classifier(folder, **more, max_steps=8, learning_rate=4e-3, num_labels=3, eval_steps=8)
        built.trainer.train()
        save(built.start, built.trainer)
        self[name] = folder / "run"
        return self[name]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp)


@pytest.fixture
def classify(repository, monkeypatch, capsys):
    """Run the script as `python eval/classify.py ...` would, in this process: its status, stdout and stderr."""
    spec = importlib.util.spec_from_file_location("classify_script", repository / "eval" / "classify.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["eval/classify.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            run_script(script.main)
        said = capsys.readouterr()
        return end.value.code, said.out, said.err

    return run


def opinions(count: int = ROWS) -> list[dict]:
    from isotune.data.sources.source import find_corpus

    return list(find_corpus("builtin:opinions").rows("test"))[:count]


def one_by_one(model, folder: Path, texts: list[str]) -> np.ndarray:
    """Probabilities by transformers alone, each text by itself."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model.eval()
    with torch.no_grad():
        logits = [
            model(**tokenizer(text, truncation=True, max_length=64, return_tensors="pt")).logits[0] for text in texts
        ]
    return torch.stack(logits).double().softmax(dim=1).numpy()


@pytest.mark.parametrize("tune", ["full", "lora", pytest.param("decoder", marks=pytest.mark.slow)])
def test_a_runs_metrics_are_those_of_a_plain_loop_over_its_saved_model(runs, classify, tmp_path, tune):
    from peft import AutoPeftModelForSequenceClassification
    from transformers import AutoModelForSequenceClassification

    folder = runs[tune] / "model"
    auto = AutoModelForSequenceClassification if tune == "full" else AutoPeftModelForSequenceClassification
    model = auto.from_pretrained(folder, num_labels=3)
    assert model.config.model_type == ("opt" if tune == "decoder" else "bert")
    rows = opinions()
    labels = [row["label"] for row in rows]
    expected = one_by_one(model, folder, [row["text"] for row in rows])
    status, out, _ = classify("--run_dir", runs[tune], "--limit", ROWS, "--no_pictures", "--output_dir", tmp_path / "e")
    assert status == 0 and f"written to {tmp_path / 'e'}" in out
    result = read_result(tmp_path / "e")
    assert [line["id"] for line in result.predictions] == list(range(ROWS))
    assert [line["label"] for line in result.predictions] == labels
    found = np.array([line["probabilities"] for line in result.predictions])
    np.testing.assert_allclose(found, expected, atol=2e-6)
    chosen = expected.argmax(axis=1)
    assert [line["prediction"] for line in result.predictions] == chosen.tolist()
    for name, value in {
        "accuracy": theirs.accuracy_score(labels, chosen),
        "f1_macro": theirs.f1_score(labels, chosen, average="macro"),
        "log_loss": theirs.log_loss(labels, expected),
        "roc_auc": theirs.roc_auc_score(labels, expected, multi_class="ovr"),
    }.items():
        assert result.metrics[name] == pytest.approx(value, abs=2e-6), name
        low, high = result.intervals[name]
        assert low <= result.metrics[name] <= high and low < high


@pytest.mark.parametrize("cells", ["words", "numbers"])
def test_a_models_classes_are_found_by_name_in_any_order_of_the_task(runs, classify, tmp_path, cells):
    from transformers import AutoModelForSequenceClassification

    folder, names = tmp_path / "model", ["GOOD", "Mixed  view", "bad"]
    shutil.copytree(runs["full"] / "model", folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"id2label": dict(enumerate(names)), "label2id": {name: k for k, name in enumerate(names)}}
    (folder / "config.json").write_text(json.dumps(config))
    own = ["bad", "good", "mixed view"]  # as the data count them: 0, 1, 2
    at = [2, 0, 1]  # where the model has these
    rows = [{"text": row["text"], "label": row["label"]} for row in opinions()]
    expected = one_by_one(AutoModelForSequenceClassification.from_pretrained(folder), folder, [r["text"] for r in rows])
    scores = expected[:, at] / expected[:, at].sum(axis=1, keepdims=True)
    labels = [row["label"] for row in rows]
    found = {}
    for task in [own] if cells == "numbers" else [own, ["Mixed View", "BAD", "Good"]]:
        written = [{**row, "label": own[row["label"]]} if cells == "words" else row for row in rows]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written))
        (tmp_path / "task.yaml").write_text(json.dumps({"dataset_name": str(tmp_path / "rows.jsonl"), "labels": task}))
        where = tmp_path / "-".join(task)
        given = ["--model", folder, "--task", tmp_path / "task.yaml", "--max_seq_length", 64]
        status, _, err = classify(*given, "--no_pictures", "--output_dir", where)
        assert status == 0, err
        found[where] = read_result(where).metrics
    for metrics in found.values():
        assert metrics == next(iter(found.values()))
        assert metrics["roc_auc"] == pytest.approx(theirs.roc_auc_score(labels, scores, multi_class="ovr"), abs=2e-6)
        for number, name in enumerate(own):
            recall = theirs.recall_score(np.array(labels) == number, scores.argmax(axis=1) == number)
            assert metrics[f"recall[{names[at[number]]}]"] == pytest.approx(recall), name
    (tmp_path / "task.yaml").write_text(
        json.dumps({"dataset_name": str(tmp_path / "rows.jsonl"), "labels": ["bad", "good", "mixed"]})
    )
    status, _, err = classify("--model", folder, "--task", tmp_path / "task.yaml", "--no_pictures")
    assert status == 2 and all(name in err for name in ("GOOD", "mixed"))


def test_batches_change_nothing(runs, classify, tmp_path):
    ways = [("--batch_size", 1), ("--batch_size", 7), ("--batch_size", 64), ("--batch_tokens", 100)]
    results = []
    for number, way in enumerate(ways):
        folder = tmp_path / str(number)
        status, *_ = classify(
            "--run_dir", runs["full"], "--limit", ROWS, "--ordinal", "--no_pictures", "--output_dir", folder, *way
        )
        assert status == 0
        results.append(read_result(folder))
    first = results[0]
    assert "quadratic_kappa" in first.metrics
    for other in results[1:]:
        assert other.metrics == pytest.approx(first.metrics, abs=1e-6)
        assert other.intervals.keys() == first.intervals.keys() == first.metrics.keys()
        for name, pair in first.intervals.items():
            assert other.intervals[name] == pytest.approx(pair, abs=1e-6), name
        assert other.facts["rows_sha256"] == first.facts["rows_sha256"]


def test_a_task_may_name_modules_of_evaluate(runs, classify, repository, tmp_path):
    module = str(repository / "eval" / "metrics" / "isotune")
    task = {"dataset_name": "builtin:opinions", "metrics": ["accuracy", {"module": module, "config_name": "accuracy"}]}
    (tmp_path / "task.yaml").write_text(json.dumps(task))  # JSON is YAML
    given = ["--task", tmp_path / "task.yaml", "--limit", ROWS, "--no_pictures", "--output_dir", tmp_path / "e"]
    status, out, _ = classify("--run_dir", runs["full"], *given)
    assert status == 0 and "isotune/accuracy: interval of 200 resamples" in out
    result = read_result(tmp_path / "e")
    assert set(result.metrics) == {"accuracy", "isotune/accuracy"} == set(result.intervals)
    assert result.metrics["isotune/accuracy"] == result.metrics["accuracy"]
    assert result.facts["metric_modules"][0]["module"] == module


def test_pictures_and_examples_stand_beside_the_numbers_and_say_the_same_in_words(runs, classify, tmp_path):
    folder = tmp_path / "e"
    task = ["--task", "eval/configs/opinions.yaml", "--max_seq_length", 100]
    status, out, _ = classify("--run_dir", runs["full"], *task, "--output_dir", folder, "--attention_ids", 3, 11)
    assert status == 0
    result = read_result(folder)
    pictures = sorted(file.stem for file in folder.glob("*.png"))
    attention = [f"attention_{kind}_{row}" for kind in ("heads", "words") for row in ("11", "3")]
    assert pictures == sorted(["confusion_matrix", "precision_recall", "reliability", *attention])
    assert all((folder / f"{name}.txt").read_text().strip() for name in pictures)
    labels = [line["label"] for line in result.predictions]
    chosen = [line["prediction"] for line in result.predictions]
    counts = theirs.confusion_matrix(labels, chosen, labels=[0, 1, 2])
    words = (folder / "confusion_matrix.txt").read_text()
    names = ["bad", "middling", "good"]
    for row, of_class in enumerate(counts):
        line = next(line for line in words.splitlines() if f"class {names[row]}:" in line)
        for column, count in enumerate(of_class):
            assert (f"{count} as {names[column]}" in line) == (count > 0)
    assert f"{result.metrics['expected_calibration_error']:.3f}" in (folder / "reliability.txt").read_text()
    assert f"{result.metrics['pr_auc[good]']:.3f}" in (folder / "precision_recall.txt").read_text()
    examples = [json.loads(line) for line in (folder / "examples.jsonl").read_text().splitlines()]
    wrong = [one for one in examples if one["actual"] != one["predicted"]]
    assert len(wrong) == min(100, sum(a != b for a, b in zip(labels, chosen, strict=True)))
    assert examples[: len(wrong)] == wrong == sorted(wrong, key=lambda one: -one["probability"])
    first = wrong[0]
    assert f"id {first['id']}: actual {first['actual']}, predicted {first['predicted']}" in out
    assert first["text"] == opinions(120)[first["id"]]["text"]


def test_the_order_of_the_rows_means_nothing_where_they_have_ids(runs, classify, tmp_path):
    rows = [{"id": f"row {number:02}", **row} for number, row in enumerate(opinions())]
    results = []
    for name, ordered in (("as", rows), ("other", [rows[i] for i in np.random.default_rng(0).permutation(ROWS)])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ordered))
        given = ["--dataset_name", tmp_path / f"{name}.jsonl", "--output_dir", tmp_path / name]
        assert classify("--run_dir", runs["full"], *given, "--no_pictures")[0] == 0
        results.append(read_result(tmp_path / name))
    first, other = results
    assert [line["id"] for line in other.predictions] == [row["id"] for row in rows]
    assert other.facts["rows_sha256"] == first.facts["rows_sha256"]
    assert other.metrics == pytest.approx(first.metrics, abs=1e-6)
    assert other.intervals["log_loss"] == pytest.approx(first.intervals["log_loss"], abs=1e-6)


def test_any_folder_with_a_classifier_is_evaluated(runs, classify, tmp_path):
    given = ["--dataset_name", "builtin:opinions", "--limit", ROWS, "--max_seq_length", 64, "--no_pictures"]
    for name, source in (("model", ("--model", runs["full"] / "model")), ("run", ("--run_dir", runs["full"]))):
        assert classify(*source, *given, "--output_dir", tmp_path / name)[0] == 0
    a, b = (read_result(tmp_path / name) for name in ("model", "run"))
    assert a.metrics == b.metrics and a.predictions == b.predictions


def test_logits_that_are_not_finite_are_counted_and_nothing_is_written(runs, classify, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(runs["full"] / "model", broken)
    weights = load_file(broken / "model.safetensors")
    weights["classifier.bias"][1] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    given = ["--dataset_name", "builtin:opinions", "--limit", 9, "--max_seq_length", 64, "--output_dir", tmp_path / "e"]
    status, _, said = classify("--model", broken, *given)
    assert status == 2 and "gives 9 of 9 rows a logit that is not finite, id 0 first" in said
    assert not (tmp_path / "e").exists()


def test_a_mistake_is_one_sentence_and_status_2(runs, classify, tmp_path):
    run = runs["full"]
    (tmp_path / "empty").mkdir()
    no_model = tmp_path / "no_model"
    no_model.mkdir()
    shutil.copy(run / "recipe.yaml", no_model)
    no_data = tmp_path / "no_data"
    shutil.copytree(run, no_data)
    recipe = [line for line in (run / "recipe.yaml").read_text().splitlines() if not line.startswith("eval_dataset")]
    (no_data / "recipe.yaml").write_text("\n".join(recipe))
    strange = tmp_path / "strange.jsonl"
    strange.write_text('{"text": "a", "label": 0}\n{"text": "b", "label": 3}\n')
    word = tmp_path / "word.jsonl"
    word.write_text('{"text": "a", "label": "awful"}\n')
    headless = small_encoder(tmp_path / "headless", "bert")
    data = ["--dataset_name", "builtin:opinions"]
    for arguments, words in (
        (["--run_dir", tmp_path / "none"], "there is no run directory"),
        (["--run_dir", tmp_path / "empty"], "is not a run directory: it has no recipe.yaml"),
        (["--run_dir", no_model], "has no model"),
        (["--run_dir", no_data], "names no evaluation data"),
        (["--run_dir", run, "--dataset_name", strange], "row 2 of .*strange.jsonl is of class 3"),
        (["--run_dir", run, "--dataset_name", word], "has the classes awful, and .* has 3 without names"),
        (["--run_dir", run, *data, "--max_seq_length", 9999], "is beyond the .* positions"),
        (["--run_dir", run, *data, "--attention_ids", "x"], "--attention_ids: no row has the id 'x'"),
        (["--run_dir", run, *data, "--batch_size", 0], "--batch_size is 0"),
        (["--run_dir", run, "--task", tmp_path / "none.yaml"], "the task file .* cannot be read"),
        (["--model", headless, *data], "lack .* tensors of BertForSequenceClassification|not a classifier"),
        (["--model", tmp_path / "none", *data], "there is no model folder"),
        (["--model", run / "model"], "there is nothing to evaluate on"),
        ([*data], "one of the arguments --run_dir --model is required"),
    ):
        status, _, said = classify(*arguments, "--output_dir", tmp_path / "e")
        lines = [line for line in said.splitlines() if line.startswith("error: ")]
        assert status == 2 and len(lines) == 1 and "Traceback" not in said, arguments
        assert re.search(words, lines[0]), (arguments, lines)
        assert not (tmp_path / "e").exists()
