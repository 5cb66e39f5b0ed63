"""Turns as other programs write them: tools that answer with data, headers of other names, texts rendered before."""

import json

import pytest
from tests.chat_tokenizers import byte_chat_tokenizer
from tests.unit.test_conversation_forms import EXCHANGE, prepared, texts

from isotune.data.sft.conversations import render_example, turns_of, unknown_header
from isotune.data.sft.forms import NamedColumns
from isotune.data.sft.messages import example_of, tools_of
from isotune.data.sft.questions import question_of
from isotune.data.sources.source import read_rows
from isotune.evaluation.tasks import eval_samples_of
from isotune.io.errors import UserError

CALL = {"name": "add", "arguments": {"a": 1}}
CALLS = {
    "a list": [{"type": "function", "function": CALL}],
    "one object": {"function": CALL},
    "JSON text of a list": json.dumps([CALL]),
    "JSON text of an object": json.dumps({"function": CALL | {"arguments": '{"a": 1}'}}),
}
ANSWERS = {
    "text": ("tool", '{"sum": 2}', '{"sum": 2}'),
    "an object": ("tool_result", {"sum": 2}, '{"sum": 2}'),
    "a list of objects": ("function_result", [{"sum": 2}, {"sum": 3}], '[{"sum": 2}, {"sum": 3}]'),
    "a number": ("tool", 2, "2"),
    "parts": ("tool", [{"type": "text", "text": "2"}], "2"),
}


@pytest.mark.parametrize("calls", CALLS)
@pytest.mark.parametrize("answer", ANSWERS)
def test_calls_and_answers_of_tools_are_read_in_every_spelling(tmp_path, calls, answer):
    role, content, written = ANSWERS[answer]
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, "tool_calls": CALLS[calls]},
        {"role": role, "content": content},
        {"role": "assistant", "content": "a"},
    ]
    called = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    whole = f"### Human: q\n### Assistant: {called}\n### Tool: {written}\n### Assistant: a"
    assert render_example(example_of(messages)).text == whole
    assert texts(prepared(tmp_path, [{"messages": messages}])) == [(f"<bos>{whole}<eos>", f" {called} a<eos>")]


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ({"role": "user", "content": None}, "message 1 has no content"),
        ({"role": "assistant", "content": None, "refusal": "no"}, "message 1 has no content"),
        ({"role": "assistant", "text": "a"}, "message 1 has no content"),
        ({"role": "user", "content": {"sum": 2}}, "message 1 has an object for its content"),
        ({"role": "tool", "content": [{"type": "image"}]}, "message 1 has a part of type 'image'"),
    ],
)
def test_a_message_that_says_nothing_readable_is_named(tmp_path, message, says):
    with pytest.raises(UserError, match=f"row 1 .* {says}"):
        prepared(tmp_path, [{"messages": [message, {"role": "assistant", "content": "a"}]}])


def test_an_answer_of_null_is_an_empty_one_and_counted(tmp_path):
    silent = [{"role": "user", "content": "q"}, {"role": "assistant", "content": None}]
    rows = [{"messages": silent}, {"text": EXCHANGE}, {"text": EXCHANGE}]
    found = prepared(tmp_path, rows)
    assert len(texts(found)) == 2 and found.table.as_dict()["dropped"]["no assistant answer"] == 1


def test_a_header_of_another_name_is_noted_with_its_row(tmp_path):
    other = "### Human: q\n### Assistant: a\n### User: r\n### Assistant: b"
    found = prepared(tmp_path, [{"text": EXCHANGE}, {"text": other}, {"text": other}])
    notes = [note for note in found.table.as_dict()["notes"] if "### User:" in note]
    assert len(notes) == 1 and notes[0].startswith("row 2 of ") and "belongs to the turn before it" in notes[0]
    assert not prepared(tmp_path, [{"text": other}], train_on="everything").table.as_dict()["notes"]


@pytest.mark.parametrize(
    ("text", "header"),
    [
        ("### System: s\n### Human: q\n### Assistant: a", None),
        ("### Human: q\n### Assistant: a\n### System: s", "### System:"),
        ("### Human: q\n### Assistant: a\n### Tool: 5\n### Assistant: b", "### Tool:"),
        ("### Instruction: q\n### Assistant: a", "### Instruction:"),
        ("### Human: q\n### assistant: b\n### Assistant: a", "### assistant:"),
        ("### Human: q\n### Assistant: #### User: a\n### Steps: 1", None),
        ("### User: q", None),  # no header at all, which is said elsewhere
    ],
)
def test_which_headers_are_unknown(text, header):
    assert unknown_header(text) == header


def test_a_system_message_before_the_first_turn_is_one_in_every_form(tmp_path):
    text = "### System: be kind\n### Human: q\n### Assistant: a"
    assert turns_of(text)[0] == {"role": "system", "content": "be kind"}
    assert turns_of("Be kind. ### Human: q")[0] == {"role": "preamble", "content": "Be kind."}
    assert texts(prepared(tmp_path, [{"text": text}])) == [(f"<bos>{text}<eos>", " a<eos>")]
    chatml = byte_chat_tokenizer("chatml")
    messages = [{"role": "system", "content": "be kind"}, *turns_of(text)[1:]]
    by_text, by_messages = (
        texts(prepared(tmp_path, [row], chatml), chatml) for row in ({"text": text}, {"messages": messages})
    )
    assert by_text == by_messages and "###" not in by_text[0][0]


def test_what_the_system_adds_to_a_question_is_asked_too():
    messages = [{"role": "user", "content": "q"}, {"role": "system", "content": "s"}]
    for more in ([], [{"role": "assistant", "content": "a"}]):
        found = question_of({"messages": [*messages, *more]}, "messages")
        assert [message["role"] for message in found[0]] == ["user", "system"]


RENDERED = {
    "Llama 3": "<|start_header_id|>user<|end_header_id|>\n\nq<|eot_id|>",
    "Mistral": "[INST] q [/INST] a",
    "Alpaca": "### Instruction:\nq\n\n### Response:\na",
}


@pytest.mark.parametrize("kind", RENDERED)
def test_texts_that_are_rendered_already_are_shown_by_training_and_evaluation(tmp_path, kind):
    row = {"text": RENDERED[kind]}
    with pytest.raises(UserError, match=r"row 1 begins '.*markers of turns as characters.*train_on: everything"):
        prepared(tmp_path, [row])
    with pytest.raises(UserError, match=r"the headers ### Human: and ### Assistant:, and row 1 begins '.*as messages"):
        eval_samples_of(read_rows(str(tmp_path / "rows.jsonl"), "test"), None, NamedColumns())
    found = prepared(tmp_path, [row], train_on="everything").table.as_dict()
    assert found["special_texts"] == (kind != "Alpaca")  # markers that are special tokens of the tokenizer


@pytest.mark.parametrize("train_on", ["all", "last", "everything"])
def test_what_is_learnt_of_tokenised_rows_is_theirs_and_said(tmp_path, train_on):
    rows = [{"input_ids": [2, 65, 66, 67], "labels": [-100, 65, 66, -100]}]
    found = prepared(tmp_path, rows, train_on=train_on)
    assert found.documents.supervised.tolist() == [False, True, True, False]
    notes = [note for note in found.table.as_dict()["notes"] if f"train_on: {train_on} is not in effect" in note]
    assert len(notes) == (train_on != "all")


@pytest.mark.parametrize("as_text", [False, True])
def test_the_tools_of_a_row_may_be_called_functions(tmp_path, as_text):
    schema = {"name": "add", "parameters": {"type": "object"}}
    wrapped = [{"type": "function", "function": schema}]
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    functions = json.dumps([schema]) if as_text else [schema]
    found = [texts(prepared(tmp_path, [{"messages": messages, **row}])) for row in (
        {"tools": wrapped}, {"functions": functions}, {"tools": None, "functions": functions},
    )]  # fmt: skip
    assert found[0] == found[1] == found[2] and "### Tools: {" in found[0][0][0]
    assert tools_of({"functions": wrapped, "tools": "[]"}) == wrapped
    for other in ("about sums", {"name": "add"}, ["add"], 3):  # a column of another meaning
        assert tools_of({"functions": other}) is None
    assert question_of({"messages": messages, "functions": functions}, "messages")[1] == tuple(wrapped)
    assert "### Tools" not in texts(prepared(tmp_path, [{"messages": messages, "functions": []}]))[0][0]


@pytest.mark.parametrize(("template", "unasked", "learnt"), [("phi", 1, "a"), ("chatml", 0, "wa"), (None, 0, "wa")])
def test_an_opening_answer_that_no_prompt_asks_for_is_counted(tmp_path, template, unasked, learnt):
    tokenizer = byte_chat_tokenizer(template)
    opening = {"role": "assistant", "content": "w"}
    messages = [opening, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    found = prepared(tmp_path, [{"messages": messages}], tokenizer)
    ((_, supervised),) = texts(found, tokenizer)
    assert found.table.as_dict()["unasked"] == unasked
    assert "".join(letter for letter in supervised if letter in "wqa") == learnt
    assert ("asks for by nothing, left out" in str(found.table)) == bool(unasked)


def test_two_system_columns_say_one_thing_or_are_refused(tmp_path):
    row = {"question": "q", "answer": "a"}
    one = texts(prepared(tmp_path, [row | {"system": " ", "system_prompt": "Be kind."}]))
    assert one == texts(prepared(tmp_path, [row | {"system": "Be kind.", "system_prompt": "Be kind."}]))
    assert "Be kind." in one[0][0]
    with pytest.raises(UserError, match="'system' and 'system_prompt' say different things"):
        prepared(tmp_path, [row | {"system": "Be kind.", "system_prompt": "Be rude."}])
