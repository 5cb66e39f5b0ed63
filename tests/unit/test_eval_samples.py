"""A model is asked the first question of each conversation; data without an answer to compare with are refused."""

import json

import pytest

from isotune.data.sources.source import find_corpus, read_rows
from isotune.evaluation.generation.completion import Decoding
from isotune.evaluation.generation.evaluate import (
    GenerationResult,
    print_generation_result,
    write_generation_result,
)
from isotune.evaluation.statistics.resampling import Scores
from isotune.evaluation.tasks import GenerationTask, eval_samples_of
from isotune.io.errors import UserError
from isotune.projects.demo import CAPITALS


def write_rows(folder, rows):
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "rows.jsonl")


def test_the_first_turn_of_every_conversation_is_asked_and_later_turns_are_not(tmp_path):
    rows = [
        {"text": "### Human: one?\n### Assistant: 1\n### Human: two?\n### Assistant: 2"},
        {"text": "### Human: only a question"},
        {"text": "### Assistant: an answer to nothing"},
        {"text": "### Human: three? ### Assistant: 3 "},
    ]
    asked = eval_samples_of(read_rows(write_rows(tmp_path, rows), "train"))
    assert [(q.id, q.prompt, q.reference) for q in asked] == [(0, "one?", "1"), (3, "three?", "3")]
    assert asked[1].where == f"row 4 of {tmp_path / 'rows.jsonl'}"


def test_messages_are_asked_like_texts(tmp_path):
    messages = [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "1"}]
    (only,) = eval_samples_of(read_rows(write_rows(tmp_path, [{"messages": messages}]), "train"))
    assert (only.prompt, only.reference) == ("one?", "1")


def said(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


@pytest.mark.parametrize(
    ("row", "prompt", "reference"),
    [
        (said(("system", "s"), ("user", "q"), ("assistant", "a")), "system: s\nuser: q", "a"),
        (said(("user", "p"), ("user", "q"), ("assistant", "a"), ("assistant", "b")), "user: p\nuser: q", "a\nb"),
        (said(("assistant", "hi"), ("user", "q"), ("assistant", "a")), "assistant: hi\nuser: q", "a"),
        ({**said(("user", "q"), ("assistant", "a")), "system": "s"}, "system: s\nuser: q", "a"),
        ({"instruction": "q", "input": "more", "output": "a"}, "q\n\nmore", "a"),
    ],
)
def test_a_question_is_asked_with_all_that_stands_before_it(tmp_path, row, prompt, reference):
    (only,) = eval_samples_of(read_rows(write_rows(tmp_path, [row]), "train"))
    assert (only.prompt, only.reference) == (prompt, reference)


def test_rows_that_are_not_asked_are_counted_by_reason(tmp_path):
    marked = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "BAD", "weight": 0}]}
    good = said(("user", "q"), ("assistant", "a"))
    rows = [good, said(("user", "q")), said(("assistant", "a")), marked, *[good] * 3]
    asked = eval_samples_of(read_rows(write_rows(tmp_path, rows), "train"))
    assert (len(asked), asked.rows_read) == (4, 7)
    assert asked.left_out == {
        "without an answer": 1, "without a question before an answer": 1,
        "with answers that are all marked not to be learnt": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    "row",
    [
        {"text": "### Human: only a question"},
        {"text": "### Human: a question\n### Assistant:   "},
        {"messages": [{"role": "user", "content": "one?"}, {"role": "assistant", "content": ""}]},
    ],
)
def test_a_data_set_of_empty_references_is_refused(tmp_path, row):
    with pytest.raises(UserError, match="no reference to compare with"):
        eval_samples_of(read_rows(write_rows(tmp_path, [row]), "train"))


def test_the_pirate_is_examined_on_countries_that_it_never_spoke_of():
    taught = " ".join(row["text"] for row in find_corpus("builtin:pirate").rows("train"))
    examined = eval_samples_of(read_rows("builtin:pirate", "test"))
    assert len(examined) == 32
    for question in examined:
        (country,) = [name for name in CAPITALS if f"of {name}?" in question.prompt]
        assert f"of {country}?" not in taught


def test_what_reading_guessed_is_printed_and_recorded(tmp_path, capsys):
    (tmp_path / "rows.csv").write_text("question;answer;topic\nq;a;t\n\nr;b;t\n")
    task = GenerationTask(dataset_name=str(tmp_path / "rows.csv"))
    asked = task.samples()
    guessed, ends, empty = asked.notes
    assert "'question', and its answer, from 'answer'; not read: 'topic'" in guessed
    assert "cells end at ';'" in ends and "1 empty lines" in empty
    rows = [{"id": one.id, "prompt": one.prompt, "text": "x", "reference": one.reference} for one in asked]
    result = GenerationResult(rows, Scores({}, {}), 0, {})
    print_generation_result(result, asked)
    said = capsys.readouterr().out
    assert all(f"note        {note}\n" in said for note in asked.notes)
    write_generation_result(result, tmp_path / "out", model="m", task=task, samples=asked, decoding=Decoding())
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["notes"] == list(asked.notes)
    own = GenerationTask(dataset_name=task.dataset_name, prompt_template="{question}", reference_template="{answer}")
    assert own.samples().notes == asked.notes[1:]
