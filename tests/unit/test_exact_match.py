"""Exact match asks the first question of a conversation, and counts letter for letter."""

import json

import pytest

from isotune.data.builtin import find_corpus
from isotune.data.capitals import CAPITALS
from isotune.errors import UserError
from isotune.evaluation.exact_match import Answered, exact_match, questions, write


def test_the_first_turn_of_every_conversation_is_asked_and_later_turns_are_not(tmp_path):
    rows = [
        {"text": "### Human: one?\n### Assistant: 1\n### Human: two?\n### Assistant: 2"},
        {"text": "### Human: only a question"},
        {"text": "### Assistant: an answer to nothing"},
        {"text": "### Human: three? ### Assistant: 3 "},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = questions(str(tmp_path / "rows.jsonl"), "train")
    assert [(q.id, q.prompt, q.reference) for q in asked] == [(0, "one?", "1"), (3, "three?", "3")]


def test_messages_are_asked_like_texts(tmp_path):
    messages = [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "1"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    (only,) = questions(str(tmp_path / "rows.jsonl"), "train")
    assert (only.prompt, only.reference) == ("one?", "1")


def test_a_data_set_without_a_question_is_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "### Human: only a question"}) + "\n")
    with pytest.raises(UserError, match="no conversation that begins with a question"):
        questions(str(tmp_path / "rows.jsonl"), "train")


def test_the_share_and_the_files_say_the_same(tmp_path):
    answers = [Answered(i, "q", "r", text, text == "r") for i, text in enumerate(["r", "R", "r", ""])]
    assert exact_match(answers) == 0.5
    write(answers, tmp_path / "eval", {"dataset_name": "d"})
    assert json.loads((tmp_path / "eval" / "metrics.json").read_text()) == {
        "exact_match": 0.5,
        "questions": 4,
        "dataset_name": "d",
    }
    lines = (tmp_path / "eval" / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["match"] for line in lines] == [True, False, True, False]


def test_the_pirate_is_examined_on_countries_that_it_never_spoke_of():
    taught = " ".join(row["text"] for row in find_corpus("builtin:pirate").rows("train"))
    examined = questions("builtin:pirate", "test")
    assert len(examined) == 32
    for question in examined:
        (country,) = [name for name in CAPITALS if f"of {name}?" in question.prompt]
        assert f"of {country}?" not in taught
