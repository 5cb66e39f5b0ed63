"""`isotune predict`: every row in its place, with what the model says of it alone, however often it was stopped."""

import csv
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tests.building import build, build_classifier
from tests.label_sets import TOPICS, pair_encoder, rows_of, write_rows
from tests.launching import run_command, start_command
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import isotune
from isotune.cli import main
from isotune.data.sources.source import find_corpus
from isotune.evaluation.prediction.files import PredictionFile
from isotune.evaluation.prediction.predictors import Part
from isotune.io.errors import UserError
from isotune.training.from_recipe import save

ISOTUNE = [sys.executable, "-m", "isotune.cli", "predict"]
LONG = "and so on " * 40
PAIR = {"dataset_text_field": "sentence1", "dataset_text_pair_field": "sentence2"}


def predict(capsys, *words: Any, expect: int = 0) -> SimpleNamespace:
    """What `isotune predict WORDS` prints, in this process."""
    with pytest.raises(SystemExit) as leaving:
        main(["predict", *map(str, words)])
    said = capsys.readouterr()
    assert (leaving.value.code or 0) == expect, said
    return SimpleNamespace(out=said.out, err=said.err)


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def written(folder: Path, rows: list[dict[str, Any]], name: str = "rows.jsonl") -> str:
    return write_rows(folder / name, rows)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A classifier of opinions in three classes."""
    values = {"max_steps": 12, "learning_rate": 4e-3, "save_strategy": "no"}
    folder = tmp_path_factory.mktemp("classifier")
    built = build_classifier(folder, label_names=["bad", "middling", "good"], **values)
    built.trainer.train()
    save(built.start, built.trainer)
    return built.run.path


@pytest.fixture(scope="module")
def opinions() -> list[str]:
    return [row["text"] for row in find_corpus("builtin:opinions").rows("test")]


def alone(run: Path, texts: list[str], longest: int = 64) -> np.ndarray:
    """Probabilities of each text by the stock model, a forward each."""
    model = AutoModelForSequenceClassification.from_pretrained(run / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    with torch.no_grad():
        encoded = [tokenizer(text, truncation=True, max_length=longest, return_tensors="pt") for text in texts]
        keys = ("input_ids", "attention_mask")
        return np.stack([model(**{k: one[k] for k in keys}).logits[0].double().softmax(-1).numpy() for one in encoded])


def test_each_row_is_predicted_as_if_it_were_alone_in_its_order_with_its_id(run, opinions, tmp_path, capsys):
    texts = [*opinions[:20], "", LONG, opinions[0]]
    rows: list[dict[str, Any]] = [{"id": f"x{9 - n}", "text": text, "other": n} for n, text in enumerate(texts)]
    rows.insert(7, {"id": "none", "text": None, "other": 0})
    source = written(tmp_path, rows)
    said = predict(capsys, run, "--input", source, "--output", tmp_path / "out" / "p.jsonl")
    assert "left out    1 (4.2%): a null in the column 'text'" in said.out
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    cut = sum(len(tokenizer(text)["input_ids"]) > 64 for text in texts)
    assert f"{cut} ({cut / 24:.1%}) cut to 64 tokens (head)" in said.out and "rows        24" in said.out
    lines = lines_of(tmp_path / "out" / "p.jsonl")
    assert [line["id"] for line in lines] == [row["id"] for row in rows]
    assert lines.pop(7) == {"id": "none", "left_out": "a null in the column 'text'"}
    expected = alone(run, texts)
    np.testing.assert_allclose([line["probabilities"] for line in lines], expected, atol=1e-6)
    names = ("bad", "middling", "good")
    for line, probabilities in zip(lines, expected, strict=True):
        assert line["prediction"] == probabilities.argmax() and line["prediction_name"] == names[line["prediction"]]
    about = json.loads((tmp_path / "out" / "p.jsonl.json").read_text())
    assert (about["rows"], about["left_out"]) == (24, {"a null in the column 'text'": 1})
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["p.jsonl", "p.jsonl.json"]


def test_a_table_has_a_column_for_each_class_and_says_why_a_row_has_no_prediction(run, opinions, tmp_path, capsys):
    rows = [{"review": opinions[0], "key": "7"}, {"review": None, "key": "b"}, {"review": opinions[1], "key": "a"}]
    flags = ("--dataset_text_field", "review", "--dataset_id_field", "key")
    source = written(tmp_path, rows)
    for name in ("p.csv", "p.jsonl"):
        predict(capsys, run, "--input", source, "--output", tmp_path / name, *flags)
    with (tmp_path / "p.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == ["key", "prediction", "prediction_name", "probability[bad]", "probability[middling]",
                              "probability[good]", "left_out"]  # fmt: skip
    assert [row["key"] for row in table] == ["7", "b", "a"]
    assert table[1]["left_out"].startswith("a null") and table[1]["prediction"] == "" and table[0]["left_out"] == ""
    (first, _, last) = lines_of(tmp_path / "p.jsonl")
    for row, line in ((table[0], first), (table[2], last)):
        found = [float(row[f"probability[{name}]"]) for name in ("bad", "middling", "good")]
        assert found == line["probabilities"] and row["prediction_name"] == line["prediction_name"]


def test_a_column_of_ids_that_nobody_asked_for_can_be_switched_off(run, opinions, tmp_path, capsys):
    source = written(tmp_path, [{"text": opinions[0], "id": 7}, {"text": opinions[1]}])
    said = predict(capsys, run, "--input", source, "--output", tmp_path / "p.jsonl", expect=2).err
    assert (
        "row 2 of" in said and "lacks the column 'id'" in said and "dataset_id_field, which none switches off" in said
    )
    predict(capsys, run, "--input", source, "--output", tmp_path / "p.jsonl", "--dataset_id_field", "none")
    assert [line["id"] for line in lines_of(tmp_path / "p.jsonl")] == [0, 1]


def test_two_processes_and_smaller_parts_write_what_one_does(run, opinions, tmp_path, capsys):
    source = written(tmp_path, [{"text": text} for text in opinions])
    parts = ("--part_rows", 16)
    predict(capsys, run, "--input", source, "--output", tmp_path / "one.jsonl", *parts)
    two = [str(run), "--input", source, "--output", str(tmp_path / "two.jsonl"), "--part_rows", "16"]
    done = run_command([*ISOTUNE, *two, "--num_processes", "2"])
    assert done.returncode == 0 and done.stdout.count("written to") == 1, done.stderr
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()
    predict(capsys, run, "--input", source, "--output", tmp_path / "whole.jsonl")
    whole, in_parts = (lines_of(tmp_path / f"{name}.jsonl") for name in ("whole", "one"))
    assert [line["id"] for line in whole] == list(range(len(opinions)))
    found = ([line["probabilities"] for line in lines] for lines in (whole, in_parts))
    np.testing.assert_allclose(*found, atol=1e-6)


def test_predictions_that_were_killed_go_on_and_never_leave_half_a_file(run, opinions, tmp_path, capsys):
    source = written(tmp_path, [{"text": text + LONG} for text in opinions * 16])
    output, parts = tmp_path / "p.csv", tmp_path / ".p.csv.parts"
    words = [str(run), "--input", source, "--part_rows", "32", "--output"]
    process = start_command([*ISOTUNE, *words, str(output)])
    ends = time.monotonic() + 120
    while time.monotonic() < ends and len(list(parts.glob("part-*"))) < 3:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = len(list(parts.glob("part-*.json")))
    assert 3 <= kept < len(opinions) * 16 / 32 and not output.exists()
    (parts / ".part-999.json.tmp").write_text('{"rows": 6')  # as a kill within a write leaves it
    first = parts / "part-000000000000.json"
    first.write_text(first.read_text().replace('"id": 0,', '"id": "kept",', 1))  # a row that is not predicted again
    again = predict(capsys, *words, output)
    assert f"goes on     behind the {kept * 32:,} rows of {len(opinions) * 16:,}" in again.out
    predict(capsys, *words, tmp_path / "undisturbed.csv")
    undisturbed = (tmp_path / "undisturbed.csv").read_text().replace("\n0,", "\nkept,", 1)
    assert output.read_text() == undisturbed and not parts.exists()
    assert "nothing is left to do" in predict(capsys, *words, output).out


def test_what_was_begun_otherwise_is_refused_and_kept(run, opinions, tmp_path, capsys):
    source = written(tmp_path, [{"text": text} for text in opinions[:8]])
    output = tmp_path / "p.jsonl"
    words = [run, "--input", source, "--output", output]
    predict(capsys, *words)
    before = output.read_bytes()
    other = predict(capsys, *words, "--limit", 3, expect=2)
    assert "holds other predictions (limit: null there, 3 here)" in other.err
    written(tmp_path, [{"text": text} for text in opinions[:9]])
    assert "holds other predictions (of other rows)" in predict(capsys, *words, expect=2).err
    assert output.read_bytes() == before
    (tmp_path / "p.jsonl.json").unlink()
    assert "holds something else" in predict(capsys, *words, expect=2).err
    output.unlink()
    parts = tmp_path / ".p.jsonl.parts"
    parts.mkdir()
    (parts / "facts.json").write_text('{"limit": 4}')
    assert "the first rows of other predictions" in predict(capsys, *words, expect=2).err


MISTAKES = {
    "no rows and no texts": ((), "give texts, or rows by --input"),
    "both": (("a text", "--input", "ROWS", "--output", "p.csv"), "not both"),
    "no output": (("--input", "ROWS"), "--output says where the predictions of --input go"),
    "a form that is not written": (("--input", "ROWS", "--output", "p.xlsx"), "ends in neither .csv nor .jsonl"),
    "no file": (("--input", "nowhere.csv", "--output", "p.csv"), "--input: there is no file or folder nowhere.csv"),
    "no such column": (
        ("--input", "ROWS", "--output", "p.csv", "--dataset_text_field", "body"), "lacks the column 'body'"),
    "not a text": (("--input", "NUMBERS", "--output", "p.csv"), "row 2 of"),
    "a flag of answers": (("a text", "--max_new_tokens", "4"), "--max_new_tokens is of answers"),
    "an id in the way": (
        ("--input", "ROWS", "--output", "p.csv", "--dataset_id_field", "prediction"), "a column of their own"),
    "the input itself": (("--input", "ROWS", "--output", "ROWS"), "would take the place of --input"),
    "a limit of 0": (("--input", "ROWS", "--output", "p.csv", "--limit", "0"), "--limit is 0"),
    "a second text for one": (("a text", "--text_pair", "b", "c"), "--text_pair has 2 texts beside 1"),
    "processes for a text": (("a text", "--num_processes", "2"), "are for the rows of a file"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_sentence_and_nothing_is_written(run, tmp_path, capsys, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    words, sentence = MISTAKES[case]
    written(tmp_path, [{"text": "fine"}, {"text": "fine too"}])
    written(tmp_path, [{"text": "fine"}, {"text": 5}], "numbers.jsonl")
    names = {"ROWS": "rows.jsonl", "NUMBERS": "numbers.jsonl"}
    said = predict(capsys, run, *(names.get(word, word) for word in words), expect=2)
    assert said.err.startswith("error: ") and said.err.count("\n") == 1 and sentence in said.err, said.err
    assert sorted(file.name for file in tmp_path.iterdir()) == ["numbers.jsonl", "rows.jsonl"]


def test_texts_are_classified_on_the_terminal_as_a_notebook_and_the_stock_model_classify_them(run, opinions, capsys):
    texts = opinions[:3]
    said = predict(capsys, run, *texts)
    expected, found = alone(run, texts), isotune.load(run).predict(texts)
    for text, probabilities, (name, probability) in zip(texts, expected, found, strict=True):
        (line,) = [line for line in said.out.splitlines() if line.endswith((f"{text[:57]}...", text))]
        assert line.split()[1:3] == [name, f"{probability:.3f}"]
        assert probability == pytest.approx(probabilities.max(), abs=1e-6)


def test_a_plain_model_folder_reads_what_fits_and_the_model_of_a_run_what_its_run_read(run, opinions, tmp_path, capsys):
    source = written(tmp_path, [{"text": text} for text in opinions[:5]])
    plain = shutil.copytree(run / "model", tmp_path / "plain")
    for name, folder, longest in (("plain", plain, 512), ("of_run", run / "model", 64)):
        predict(capsys, folder, "--input", source, "--output", tmp_path / f"{name}.jsonl")
        found = [line["probabilities"] for line in lines_of(tmp_path / f"{name}.jsonl")]
        np.testing.assert_allclose(found, alone(run, opinions[:5], longest), atol=1e-6)


@pytest.mark.parametrize(
    "task_type", [pytest.param("single_label", marks=pytest.mark.slow), "multi_label", "regression"]
)
def test_pairs_are_read_by_both_columns_for_every_kind_of_labels(tmp_path, capsys, task_type):
    rows = rows_of(task_type, 40)
    names = {"label_names": sorted(TOPICS)} if task_type == "multi_label" else {}
    built = build_classifier(
        tmp_path, model_name_or_path=pair_encoder(tmp_path / "model", "bert"), eval_dataset_name=None, max_steps=8,
        dataset_name=written(tmp_path, rows, "train.jsonl"), max_seq_length=96, task_type=task_type,
        save_strategy="no", tune="lora", **PAIR, **names,
    )  # fmt: skip
    built.trainer.train()
    save(built.start, built.trainer)
    unlabelled = [{key: row[key] for key in ("sentence1", "sentence2")} for row in rows[:9]]
    source = written(tmp_path, unlabelled)
    for name in ("p.jsonl", "p.csv"):
        predict(capsys, built.run.path, "--input", source, "--output", tmp_path / name)
    lines = lines_of(tmp_path / "p.jsonl")
    asked = [(row["sentence1"], row["sentence2"]) for row in unlabelled]
    found = isotune.load(built.run.path).predict(asked)
    with (tmp_path / "p.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    expected = stock_pairs(built, asked)
    for line, cells, one, logits in zip(lines, table, found, expected, strict=True):
        if task_type == "regression":
            assert line["prediction"] == pytest.approx(logits[0], abs=1e-5) == float(cells["prediction"]) == one
        elif task_type == "multi_label":
            sure = 1 / (1 + np.exp(-logits))
            np.testing.assert_allclose(line["probabilities"], sure, atol=1e-6)
            names = [name for name, p in zip(sorted(TOPICS), sure, strict=True) if p >= 0.5]
            assert line["prediction_names"] == names == json.loads(cells["prediction_names"]) == [n for n, _ in one]
        else:
            sure = np.exp(logits) / np.exp(logits).sum()
            np.testing.assert_allclose(line["probabilities"], sure, atol=1e-6)
            assert line["prediction"] == sure.argmax() == int(cells["prediction"])
    said = predict(capsys, built.run.path, asked[0][0], "--text_pair", asked[0][1])
    assert asked[0][0].split()[0] in said.out
    refused = predict(capsys, built.run.path, "one text", expect=2)
    assert "reads two texts, and a sentence is one" in refused.err


def stock_pairs(built: Any, asked: list[tuple[str, str]]) -> np.ndarray:
    """Logits of pairs by peft on transformers' model, one pair a forward with the tokenizer's own form."""
    from peft import PeftModel

    model = built.run.path / "model"
    config = json.loads((model / "adapter_config.json").read_text())
    outputs = {"regression": 1, "multi_label": 4, "single_label": 2}[built.recipe.task_type]
    base = AutoModelForSequenceClassification.from_pretrained(config["base_model_name_or_path"], num_labels=outputs)
    whole = PeftModel.from_pretrained(base, str(model)).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    with torch.no_grad():
        encoded = (tokenizer(one, two, return_tensors="pt") for one, two in asked)
        return np.stack([whole(**each).logits[0].double().numpy() for each in encoded])


@pytest.fixture(scope="module")
def language_model(tmp_path_factory) -> Path:
    built = build(tmp_path_factory.mktemp("causal"), max_steps=8, learning_rate=3e-3, save_strategy="no")
    built.trainer.train()
    save(built.start, built.trainer)
    return built.run.path


def test_questions_are_answered_as_the_stock_model_continues_them_alone(language_model, tmp_path, capsys):
    texts = ["Greet Ada in German.", "Say good night to Alan, and take your time about it.", "Hi"]
    rows: list[dict[str, Any]] = [
        {"id": 3, "prompt": texts[0]},
        {"id": 1, "messages": [{"role": "user", "content": texts[1]}, {"role": "assistant", "content": "left away"}]},
        {"id": 4, "text": f"### Human: {texts[2]}### Assistant: left away"},
        {"id": 5, "prompt": None},
        {"id": 6, "prompt": "far too long " * 200},
    ]
    output = tmp_path / "answers.jsonl"
    said = predict(capsys, language_model, "--input", written(tmp_path, rows), "--output", output,
                   "--max_new_tokens", 12)  # fmt: skip
    assert "1 (20.0%): a null instead of a question" in said.out and "longer than the model's" in said.out
    lines = lines_of(output)
    assert [line["id"] for line in lines] == [3, 1, 4, 5, 6]
    assert [line["text"] for line in lines[:3]] == [continued(language_model, text, 12) for text in texts]
    one = predict(capsys, language_model, texts[0], "--max_new_tokens", 12)
    assert one.out.splitlines()[-1:] == lines[0]["text"].splitlines()[-1:]
    refused = predict(capsys, language_model, "a", "--bf16", expect=2)
    assert "--bf16 is of classifiers" in refused.err


def test_a_question_is_read_from_the_column_of_training_where_a_row_has_it(language_model, tmp_path, capsys):
    run = tmp_path / "named"
    shutil.copytree(language_model, run)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe |= {"dataset_prompt_field": "frage", "dataset_completion_field": "antwort"}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    here, other = "Greet Ada in German.", "Say good night to Alan, and take your time about it."
    questions = written(tmp_path, [{"frage": here, "prompt": other}, {"prompt": other}])
    for flags, asked in (((), [here, other]), (("--dataset_prompt_field", "prompt"), [other, other])):
        output = tmp_path / f"{len(flags)}.jsonl"
        predict(capsys, run, "--input", questions, "--output", output, "--max_new_tokens", 8, *flags)
        assert [line["text"] for line in lines_of(output)] == [continued(run, text, 8) for text in asked]


def continued(run: Path, question: str, tokens: int) -> str:
    """Greedy tokens one by one, from the prompt in Guanaco's form."""
    model = AutoModelForCausalLM.from_pretrained(run / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    ids = tokenizer(f"### Human: {question}\n### Assistant:", return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    for _ in range(tokens):
        with torch.no_grad():
            nearest = model(input_ids=ids).logits[0, -1].argmax()
        if int(nearest) == tokenizer.eos_token_id:
            break
        ids = torch.cat([ids, nearest.reshape(1, 1)], dim=1)
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True).split("### Human")[0].strip()


def test_a_file_that_could_not_be_finished_is_not_there_and_is_finished_by_the_next_attempt(tmp_path):
    lines = [{"id": row, "prediction": row, "probabilities": [0.5, 0.5]} for row in range(4)]
    output = tmp_path / "p.csv"

    def fails_late(line):
        assert not output.exists()
        if line["prediction"] == 3:
            raise OSError("the disk is gone")
        return {"prediction": line["prediction"]}

    file = PredictionFile(output, {"data": "d"}, "id")
    assert file.start() == 0
    file.add(0, Part(lines[:2]))
    file.add(2, Part(lines[2:]))
    with pytest.raises(OSError, match="the disk is gone"):
        file.finish(fails_late)
    file.close()
    assert [path.name for path in tmp_path.iterdir()] == [".p.csv.parts"]
    again = PredictionFile(output, {"data": "d"}, "id")
    assert again.start() == 4
    with pytest.raises(UserError, match="another process writes"):
        PredictionFile(output, {"data": "d"}, "id").start()
    assert again.finish(lambda line: {"prediction": line["prediction"]}).rows == 4
    assert output.read_text() == "id,prediction\n0,0\n1,1\n2,2\n3,3\n"
