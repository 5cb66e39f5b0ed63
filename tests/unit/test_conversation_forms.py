"""Rows in the forms that are found in the wild, their marks, and what is said of those that cannot be read."""

import json
import math
from datetime import datetime
from decimal import Decimal

import pytest
from pyarrow import Table, parquet
from tests.chat_tokenizers import byte_chat_tokenizer

from isotune.config import Recipe
from isotune.data.sft.messages import read_message
from isotune.data.sft.preparation import SftSettings, prepare
from isotune.data.sft.questions import question_of
from isotune.evaluation.tasks import GenerationTask, read_task
from isotune.io.errors import UserError

EXCHANGE = "### Human: q\n### Assistant: a"
TALK = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def prepared(folder, rows, tokenizer=None, **settings):
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return prepare(str(file), "train", tokenizer or byte_chat_tokenizer(), SftSettings(**settings), show_progress=False)


def texts(found, tokenizer=None):
    """(document, what is learnt of it) as text."""
    tokenizer, documents = tokenizer or byte_chat_tokenizer(), found.documents
    spans = zip(documents.starts[:-1], documents.starts[1:], strict=True)
    pieces = [(documents.input_ids[s:e], documents.supervised[s:e]) for s, e in spans]
    return [(tokenizer.decode(ids.tolist()), tokenizer.decode(ids[mask].tolist())) for ids, mask in pieces]


@pytest.mark.parametrize(
    "row",
    [
        {"text": EXCHANGE},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"text": None, "conversations": [{"from": "user", "role": None, "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, {"role": "model", "content": "a"}]},
        {"prompt": "q", "completion": "a"},
        {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]},
        {"prompt": "### Human: q\n### Assistant:", "completion": " a"},
        {"instruction": "q", "input": "", "output": "a"},
        {"instruction": "q", "context": None, "response": "a", "category": "x"},
        {"question": "q", "answer": "a", "id": 7},
        {"query": "q", "response": "a"},
        {"input": "q", "output": "a"},
        {"messages": [{"role": "User", "content": "q"}, {"role": "ASSISTANT", "content": "a"}]},
        {"messages": [{"role": "prompter", "content": "q"}, {"role": " ai ", "content": "a"}]},
        {"conversations": [{"from": "Human", "value": "q"}, {"from": "GPT", "value": "a"}]},
        {"messages": [{"role": "user", "from": "human", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"messages": '[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]'},
        {"text": "[{'role': 'user', 'content': 'q'}, {'role': 'assistant', 'content': 'a'}]"},
        {"messages": {"role": ["user", "assistant"], "content": ["q", "a"]}},
        {"conversations": {"from": ["human", "gpt"], "value": ["q", "a"], "weight": None}},
        {"messages": [{"role": "user", "content": {"type": "text", "text": "q"}},
                      {"role": "assistant", "content": [{"type": "output_text", "text": "a"}]}]},
        {"instruction": "q", "input": float("nan"), "output": "a"},
        {"text": float("nan"), "question": "q", "answer": "a"},
        {"Instruction": "q", "Input": "", "Output": "a"},
        {" Question ": "q", "ANSWER": "a"},
        {"Text": EXCHANGE},
        {"Messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    ],
)  # fmt: skip
def test_every_form_of_one_exchange_is_the_same_document(tmp_path, row):
    assert texts(prepared(tmp_path, [row])) == [(f"<bos>{EXCHANGE}<eos>", " a<eos>")]


def test_alpacas_input_and_a_system_column_are_part_of_what_is_asked(tmp_path):
    rows = [
        {"instruction": "q", "input": "more", "output": "a", "system": "s"},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
    ]
    assert [text for text, _ in texts(prepared(tmp_path, rows))] == [
        "<bos>### System: s\n### Human: q\n\nmore\n### Assistant: a<eos>",
        "<bos>### System: s\n### Human: q\n### Assistant: a<eos>",
    ]


MARKED = [
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "WRONG"},
    {"role": "user", "content": "again"},
    {"role": "assistant", "content": "right"},
]


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"loss": False}, {"loss": 0, "weight": 1}])
@pytest.mark.parametrize("template", [None, "chatml"])
def test_a_marked_answer_is_text_and_is_counted_and_is_not_learnt(tmp_path, mark, template):
    tokenizer = byte_chat_tokenizer(template)
    rows = [{"messages": [message | (mark if message["content"] == "WRONG" else {}) for message in MARKED]}]
    found = prepared(tmp_path, rows, tokenizer)
    ((text, learnt),) = texts(found, tokenizer)
    assert "WRONG" in text and learnt == (" right<eos>" if template is None else "right<|im_end|>\n")
    assert found.table.counts["marked"] == 1
    assert "answers marked not to be learnt 1" in " ".join(str(found.table).split())


@pytest.mark.parametrize("template", [None, "chatml", "phi"])
@pytest.mark.parametrize("marked", ["WRONG", "right"])
def test_a_marked_answer_is_not_learnt_with_everything_either(tmp_path, template, marked):
    tokenizer = byte_chat_tokenizer(template)
    rows = [{"messages": [message | ({"train": False} if message["content"] == marked else {}) for message in MARKED]}]
    plain = prepared(tmp_path, [{"messages": MARKED}], tokenizer, train_on="everything")
    found = prepared(tmp_path, rows, tokenizer, train_on="everything")
    ((text, learnt),), ((same, whole),) = texts(found, tokenizer), texts(plain, tokenizer)
    assert text == same and marked in whole and whole in text
    end = {None: "", "chatml": "<|im_end|>\n", "phi": "<|end|>\n"}[template]
    answer = f" {marked}" if template is None else f"{marked}{end}"
    if template == "phi" and marked == "right":
        answer += "<eos>"  # which ends the whole text, and the answer with it
    assert learnt == whole.replace(answer, "") != whole
    assert found.table.counts["marked"] == 1


@pytest.mark.parametrize("template", [None, "chatml"])
def test_an_answer_within_a_prompt_is_learnt_with_everything_alone(tmp_path, template):
    tokenizer = byte_chat_tokenizer(template)
    rows = [{"prompt": MARKED[:3], "completion": MARKED[3:]}]
    ((_, learnt),) = texts(prepared(tmp_path, rows, tokenizer), tokenizer)
    found = prepared(tmp_path, rows, tokenizer, train_on="everything")
    ((_, whole),) = texts(found, tokenizer)
    assert "WRONG" not in learnt and "WRONG" in whole and found.table.counts["marked"] == 0


def test_a_field_that_nothing_reads_is_named_once_and_one_that_the_template_reads_is_not(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "q", "mood": "sad"}, {"role": "assistant", "content": "a"}]}] * 3
    found = prepared(tmp_path, rows)
    assert found.table.counts["fields_not_read"] == ["mood"]
    assert str(found.table).count("mood") == 1
    reads = byte_chat_tokenizer("chatml")
    reads.chat_template += "{# mood #}"
    assert prepared(tmp_path, rows, reads).table.counts["fields_not_read"] == []


CALLS = [
    {"role": "user", "content": "tide?"},
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1}'}}]},
    {"role": "tool", "content": "17:42"},
    {"role": "assistant", "content": "At 17:42."},
]  # fmt: skip


def test_tool_calls_are_learnt_and_their_results_are_not(tmp_path):
    rows = [{"messages": CALLS, "tools": json.dumps([{"name": "f"}])}]
    ((text, learnt),) = texts(prepared(tmp_path, rows))
    call = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    assert text == (
        f'<bos>### Tools: {{"name": "f"}}\n### Human: tide?\n### Assistant: {call}\n### Tool: 17:42\n'
        "### Assistant: At 17:42.<eos>"
    )
    assert learnt == f" {call} At 17:42.<eos>"
    for own in ({"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"a": 1}'}},
                {"role": "tool_call", "content": '{"name": "f", "arguments": {"a": 1}}'},
                {"role": "function_call", "content": {"name": "f", "arguments": {"a": 1}}}):  # fmt: skip
        spelled = [{**rows[0], "messages": [CALLS[0], own, {**CALLS[2], "role": "function"}, *CALLS[3:]]}]
        assert texts(prepared(tmp_path, spelled)) == [(text, learnt)]
    chatml = byte_chat_tokenizer("chatml")
    ((_, learnt),) = texts(prepared(tmp_path, rows, chatml), chatml)
    call = '<call>{"name": "f", "arguments": {"a": 1}}</call>'
    assert learnt == f"{call}<|im_end|>\nAt 17:42.<|im_end|>\n"


@pytest.mark.parametrize(
    ("row", "template", "sentence"),
    [
        ({"messages": CALLS}, "phi", "row 1 of .*: it has tool_calls, which the chat template does not read"),
        ({"messages": CALLS[:1] + CALLS[3:], "tools": [{"name": "f"}]}, "phi", "has tools, which the chat template"),
        ({"messages": [{"role": "system", "content": "s"}, *MARKED]}, "gemma", "the chat template refuses it"),
        ({"messages": MARKED}, "opens_thinking", "message 4: the chat template asks for this answer with another text"),
        ({"messages": [{"role": "user", "content": "q", "train": True}]}, None, "message 1 is by the user"),
        ({"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]}, None, "message 1 has weight 0.5"),
        ({"messages": [{"role": "user", "content": "q", "value": "other"}]}, None,
         "message 1 has content 'q' and value 'other': leave one of them out"),
        ({"messages": [{"role": "user", "from": "gpt", "content": "q"}]}, None, "has role 'user' and from 'gpt'"),
        ({"messages": [{"role": "assistant", "text": "a"}]}, None, "message 1 has no content; it has role, text"),
        ({"messages": [{"speaker": "gpt", "value": "a"}]}, None, "message 1 has no role; it has speaker, value"),
        *(({"messages": [{"role": "assistant", "content": "a", mark: 0}]}, None, f"message 1 has {mark} 0, which may")
          for mark in ("mask", "loss_mask", "Trainable", "ignore", "train_on_turn", "weights", "no_train")),
        ({"messages": [{"role": "system", "content": "s"}, *MARKED], "system": "t"}, None,
         "the system column says something else than the system message"),
        *(({"messages": TALK, name: held}, None, f"column '{name}': stands beside the texts, and only")
          for name, held in (("image", "x.jpg"), ("images", [{"bytes": "x"}]), ("Video", {"path": "x"}))),
        ({"question": "q", "answer": "a", "image": "x.jpg"}, None, "column 'image': stands beside the texts"),
        ({"input_ids": [5, 6], "labels": [5, 7]}, None, "token 2 is 7, and input_ids has 6 there"),
        ({"input_ids": [5, 99999]}, None, "a token outside the tokenizer's"),
        ({"input_ids": [5, 6], "attention_mask": [1]}, None, "has 1 numbers, and input_ids 2"),
        ({"input_ids": [5, 6, 7], "seq_lengths": [1, 2]}, None, "several documents in one row"),
        ({"input_ids": [5, 6, 7], "position_ids": [0, 1, 0]}, None, "several documents in one row"),
    ],
)  # fmt: skip
def test_what_cannot_be_right_is_refused_by_row(tmp_path, row, template, sentence):
    with pytest.raises(UserError, match=sentence):
        prepared(tmp_path, [row], byte_chat_tokenizer(template))


@pytest.mark.parametrize("nothing", [None, "", [], {"bytes": None, "path": None}, [None]])
def test_an_image_that_is_none_is_passed_over(tmp_path, nothing):
    assert texts(prepared(tmp_path, [{"messages": TALK, "image": nothing}])) == [(f"<bos>{EXCHANGE}<eos>", " a<eos>")]


def test_a_column_that_is_named_may_be_called_as_an_image(tmp_path):
    found = prepared(tmp_path, [{"image": EXCHANGE}], dataset_text_field="image")
    assert texts(found) == [(f"<bos>{EXCHANGE}<eos>", " a<eos>")]


def test_texts_without_a_header_are_refused_with_what_they_look_like_and_the_way_out(tmp_path):
    rows = [{"text": "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"}] * 2
    with pytest.raises(UserError, match=r"headers ### Human: and ### Assistant:, and row 1 begins '<\|im_start\|>user"):
        prepared(tmp_path, rows)


@pytest.mark.parametrize(("template", "prefix"), [(None, "<bos>"), ("chatml", "<bos>")])
def test_any_text_is_learnt_as_a_whole(tmp_path, template, prefix):
    tokenizer = byte_chat_tokenizer(template)
    ((text, learnt),) = texts(
        prepared(tmp_path, [{"text": "plain <eos> text"}], tokenizer, train_on="everything"), tokenizer
    )
    assert text == f"{prefix}plain <eos> text<eos>" and learnt == "plain <eos> text<eos>"
    ids = prepared(tmp_path, [{"text": "plain <eos> text"}], tokenizer, train_on="everything").documents.input_ids
    assert (ids == tokenizer.eos_token_id).sum() == 1, "an eos that is written out is text"


def test_tokenised_rows_are_learnt_as_they_stand(tmp_path):
    rows = [
        {"input_ids": [2, 10, 11, 12], "labels": [-100, -100, 11, 12]},
        {"input_ids": [2, 10, 11, 0], "assistant_masks": [0, 1, 0, 0], "attention_mask": [1, 1, 1, 0]},
        {"input_ids": [10, 11], "seq_lengths": [2], "position_ids": [0, 1]},
    ]
    documents = prepared(tmp_path, rows).documents
    assert documents.input_ids.tolist() == [2, 10, 11, 12, 2, 10, 11, 10, 11]
    assert documents.supervised.tolist() == [False, False, True, True, False, True, False, False, True]


@pytest.mark.parametrize(
    "beside",
    [{"messages": TALK}, {"text": EXCHANGE}, {"question": "q", "answer": "a"}, {"text": "t", "messages": TALK}],
)
def test_tokens_are_learnt_and_not_what_they_were_made_of(tmp_path, beside):
    found = prepared(tmp_path, [beside | {"input_ids": [5, 6, 7], "labels": [-100, -100, 7]}])
    assert found.documents.input_ids.tolist() == [5, 6, 7]
    assert found.documents.supervised.tolist() == [False, False, True]
    said = f"rows are read from the column 'input_ids', and {' and '.join(map(repr, beside))} "
    assert any(note.startswith(said) for note in found.table.counts["notes"])
    task = GenerationTask(dataset_name=str(tmp_path / "rows.jsonl"), dataset_split="train")
    if beside != {"text": "t", "messages": TALK}:  # an evaluation has to show words
        assert [sample.reference for sample in task.samples()] == ["a"]


def test_guanacos_text_is_laid_out_by_a_template_too(tmp_path):
    tokenizer = byte_chat_tokenizer("chatml")
    ((text, learnt),) = texts(
        prepared(tmp_path, [{"text": "Be kind. ### Human: q ### Assistant: a"}], tokenizer), tokenizer
    )
    assert text == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
    )
    assert learnt == "a<|im_end|>\n"


def test_two_messages_of_one_role_are_one_turn_where_the_template_insists(tmp_path):
    messages = [
        {"role": "user", "content": "p"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
    ]
    tokenizer = byte_chat_tokenizer("gemma")
    ((text, learnt),) = texts(prepared(tmp_path, [{"messages": messages}], tokenizer), tokenizer)
    assert "<start_of_turn>user\np\nq<end_of_turn>" in text and learnt == "a<end_of_turn>\n"


def test_rewritten_turns_are_counted_and_rows_are_counted_once(tmp_path):
    tokenizer = byte_chat_tokenizer("qwen_thinking")
    counts = prepared(tmp_path, [{"messages": MARKED}, {"messages": MARKED[:2]}], tokenizer).table.counts
    assert (counts["read"], counts["kept"], counts["documents"], counts["rewritten"]) == (2, 2, 3, 1)


def test_a_prompt_that_is_cut_otherwise_alone_is_counted(tmp_path):
    tokenizer = byte_chat_tokenizer("llama3", merges=True, gpt2=True)  # GPT-2 parts two line ends before a word
    counts = prepared(tmp_path, [{"messages": MARKED[:2]}], tokenizer).table.counts
    assert counts["asked_otherwise"] == 1
    assert (
        prepared(tmp_path, [{"messages": MARKED[:2]}], byte_chat_tokenizer("llama3")).table.counts["asked_otherwise"]
        == 0
    )


NAMED = {"dataset_prompt_field": "frage", "dataset_completion_field": "antwort"}


def test_question_and_answer_are_read_from_the_columns_that_are_named(tmp_path):
    rows = [{"frage": "q", "antwort": "a", "question": "x", "answer": "y"}]
    found = prepared(tmp_path, rows, **NAMED)
    assert texts(found) == [(f"<bos>{EXCHANGE}<eos>", " a<eos>")] and found.table.counts["notes"] == []
    spoken = [{"frage": [{"role": "user", "content": "q"}], "antwort": "a", "system": None}]
    assert texts(prepared(tmp_path, spoken, **NAMED)) == texts(found)
    assert prepared(tmp_path, rows).fingerprint != found.fingerprint


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"frage": "q", "answer": "a"}, r"row 2 of .* lacks the column 'antwort'.* by dataset_compl"),
        ({"frage": "q", "antwort": None}, r"row 2 of .*, column 'antwort': holds null"),
        ({"frage": "q", "antwort": 3}, r"row 2 of .*, column 'antwort': holds a number, neither a text nor a list"),
        ({"frage": {"a": 1}, "antwort": "a"}, r"row 2 of .*, column 'frage': holds an object, neither"),
        ({"frage": TALK[:1], "antwort": [{"role": "assistant"}, {}]}, r"row 2 of .*, column 'antwort': message 2 has"),
        ({"frage": [{"content": "q"}], "antwort": "a"}, r"row 2 of .*, column 'frage': message 1 has no role"),
    ],
)
def test_a_row_without_the_named_columns_is_refused_by_its_number(tmp_path, row, sentence):
    with pytest.raises(UserError, match=sentence):
        prepared(tmp_path, [{"frage": "q", "antwort": "a"}, row], **NAMED)


@pytest.mark.parametrize("write", [json.dumps, str])
def test_a_question_and_an_answer_that_are_written_out_are_messages(tmp_path, write):
    expected = [(f"<bos>{EXCHANGE}<eos>", " a<eos>")]
    for asked, answered in ((TALK[:1], TALK[1:]), (TALK[:1], "a"), ("q", TALK[1:])):
        row = {
            "prompt": asked if isinstance(asked, str) else write(asked),
            "completion": answered if isinstance(answered, str) else write(answered),
        }
        assert texts(prepared(tmp_path, [row])) == expected


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"question": "q", "answer": "a"}, "answer"),
        ({"Question": "q", "Response": "a"}, "Response"),
        ({"prompt": "q", "completion": "a"}, "prompt"),
        ({"instruction": "q", "input": None, "output": "a"}, "output"),
        ({"input": "q", "output": "a"}, "input"),
        ({"conversation": TALK}, "conversation"),
        ({"input_ids": [5, 6]}, "input_ids"),
    ],
)
def test_a_null_is_named_by_its_own_column(tmp_path, row, column):
    with pytest.raises(UserError, match=f"row 2 of .*, column '{column}': holds null, n"):
        prepared(tmp_path, [row, row | {column: None}])


def test_preferences_are_refused_with_the_flags_that_train_on_the_chosen_answers(tmp_path):
    for row, flags in (
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, {"prompt_field": "prompt", "completion_field": "chosen"}),
        ({"chosen": TALK, "rejected": TALK[:1]}, {"text_field": "chosen"}),
        ({"prompt": "q", "chosen": TALK, "rejected": TALK[:1]}, {"text_field": "chosen"}),
        (
            {"prompt": TALK[:1], "chosen": TALK[1:], "rejected": TALK[1:]},
            {"prompt_field": "prompt", "completion_field": "chosen"},
        ),
        (
            {"question": "q", "chosen": "a", "rejected": "b"},
            {"prompt_field": "question", "completion_field": "chosen"},
        ),
        (
            {"instruction": "q", "chosen": TALK[1:], "rejected": TALK[1:]},
            {"prompt_field": "instruction", "completion_field": "chosen"},
        ),
    ):
        with pytest.raises(UserError, match=r"row 1 of .* is a preference: .* the chosen answers alone") as told:
            prepared(tmp_path, [row])
        assert all(f"dataset_{key}: {column}" in str(told.value) for key, column in flags.items())
        named = {f"dataset_{key}": column for key, column in flags.items()}
        assert texts(prepared(tmp_path, [row], **named)) == [(f"<bos>{EXCHANGE}<eos>", " a<eos>")]
    with pytest.raises(UserError, match="no column is known as one: name it by dataset_prompt_field, with dataset_co"):
        prepared(tmp_path, [{"frage": "q", "chosen": TALK[1:], "rejected": TALK[1:]}])


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question": "q", "answer": "a", "id": 7, "topic": "t"}, "'question', and its answer, from 'answer'; not "
         "read: 'id' and 'topic' (dataset_prompt_field, dataset_completion_field name others)"),
        ({"instruction": "q", "input": "", "output": "a"}, "from 'instruction' and 'input', and its answer, from 'out"),
        ({"prompt": "q", "completion": "a", "tools": None}, "from 'prompt', and its answer, from 'completion' (data"),
        ({"text": EXCHANGE, "messages": [{"role": "user", "content": "q"}]}, "'text', and 'messages' is left"),
    ],
)  # fmt: skip
def test_a_form_that_is_guessed_is_said_once(tmp_path, row, said):
    found = prepared(tmp_path, [row] * 3)
    (note,) = found.table.counts["notes"]
    assert said in note and note in str(found.table)
    assert prepared(tmp_path, [{"text": EXCHANGE}]).table.counts["notes"] == []


def test_an_alpaca_row_with_a_text_beside_it_says_what_is_left(tmp_path):
    row = {"instruction": "q", "input": "i", "output": "a", "text": "Below is an instruction"}
    said = "from the column 'text', and 'instruction' and 'input' and 'output' are left: a question and its answer"
    with pytest.raises(UserError, match=f"none of the 2 rows .* can be trained on: .*{said}, which are read where 'te"):
        prepared(tmp_path, [row] * 2)
    (note,) = prepared(tmp_path, [row], train_on="everything").table.counts["notes"]
    assert said in note
    del row["text"]
    assert texts(prepared(tmp_path, [row])) == [("<bos>### Human: q\n\ni\n### Assistant: a<eos>", " a<eos>")]


@pytest.mark.parametrize("more", ["input", "Context"])
def test_what_stands_below_a_named_instruction_is_said_where_it_holds_something(tmp_path, more):
    named = {"dataset_prompt_field": "instruction", "dataset_completion_field": "output"}
    rows = [{"instruction": "q", more: held, "output": "a"} for held in ("", None)]
    assert prepared(tmp_path, rows, **named).table.counts["notes"] == []
    (note,) = prepared(tmp_path, [*rows, rows[0] | {more: "i"}], **named).table.counts["notes"]
    assert note == f"not read below 'instruction', which dataset_prompt_field names alone: {more!r}"


@pytest.mark.parametrize("row", [{"text": EXCHANGE}, {"prompt": "### Human: q\n### Assistant:", "completion": " a"}])
def test_what_stands_beside_a_text_that_is_laid_out_is_named_as_not_read(tmp_path, row):
    found = prepared(tmp_path, [row | {"System": "s", "tools": [{"name": "f"}], "functions": " "}] * 2)
    assert texts(found) == texts(prepared(tmp_path, [row] * 2))
    said = "not read beside a text, which stands for itself: 'System' and 'tools' (messages have a place for them)"
    assert found.table.counts["notes"][-1] == said


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"reasoning_content": "", "thinking": "why"}, "why"),
        ({"reasoning": "why", "thinking": " why "}, " why "),
        ({"thinking": "", "reasoning": ""}, None),
    ],
)
def test_reasoning_is_found_under_whatever_name_it_has(fields, kept):
    message, _ = read_message({"role": "assistant", "content": "a", **fields}, 1)
    assert message.get("reasoning_content") == kept and not {"thinking", "reasoning"} & message.keys()


def test_two_reasonings_of_one_answer_are_refused():
    with pytest.raises(ValueError, match="message 1 has thinking 'one' and reasoning 'two': leave one of them out"):
        read_message({"role": "assistant", "content": "a", "thinking": "one", "reasoning": "two"}, 1)


def test_both_columns_are_named_or_none():
    required = {"model_name_or_path": "m", "dataset_name": "d", "output_dir": "o"}
    with pytest.raises(UserError, match="name both columns, the question's and the answer's"):
        Recipe.from_values(**required, dataset_prompt_field="q")
    with pytest.raises(UserError, match="dataset_text_field has no effect: dataset_prompt_field and"):
        Recipe.from_values(**required, **NAMED, dataset_text_field="t")
    with pytest.raises(UserError, match="prompt_column is not a key here: say dataset_prompt_field"):
        Recipe.from_values(**required, prompt_column="q")


def test_an_evaluation_asks_from_the_columns_that_are_named(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"frage": "q", "antwort": "a", "question": "x", "answer": "y"}\n')
    (asked,) = read_task(GenerationTask, None, {"dataset_name": str(file), **NAMED}).samples()
    assert (asked.prompt, asked.reference) == ("q", "a")
    (asked,) = read_task(GenerationTask, None, {"dataset_name": str(file)}).samples()
    assert (asked.prompt, asked.reference) == ("x", "y")


@pytest.mark.parametrize("nothing", [None, math.nan])
def test_a_field_without_a_value_is_as_good_as_none(tmp_path, nothing):
    plain = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}]
    empty = dict.fromkeys(("from", "value", "weight", "train", "tool_calls", "reasoning", "mood"), nothing)
    rows = [{"messages": [{**message, **empty} for message in plain[0]["messages"]], "system": nothing}]
    assert texts(prepared(tmp_path, rows)) == texts(prepared(tmp_path, plain))
    assert prepared(tmp_path, rows).table.counts["fields_not_read"] == []


@pytest.mark.parametrize(("fields", "learnt"), [({"Weight": 0}, " b<eos>"), ({"WEIGHT": 1}, " a b<eos>")])
def test_fields_of_messages_are_known_in_any_case(tmp_path, fields, learnt):
    messages = [{"Role": "user", "Content": "q"}, {"ROLE": "Assistant", "content": "a", **fields}]
    messages += [{"role": "user", "content": "r"}, {"role": "assistant", "content": "b"}]
    assert [own for _, own in texts(prepared(tmp_path, [{"messages": messages}]))] == [learnt]


ASKED = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    "form", [{"question": "q", "response": "a"}, {"instruction": "q", "output": "a"}, {"messages": ASKED}]
)
def test_a_system_prompt_stands_before_what_is_asked_under_either_name(tmp_path, form):
    expected = [("<bos>### System: Be brief.\n### Human: q\n### Assistant: a<eos>", " a<eos>")]
    for name in ("system", "system_prompt"):
        assert texts(prepared(tmp_path, [{**form, name: "Be brief."}])) == expected
    twice = {"messages": [{"role": "system", "content": "Be brief."}, *ASKED], "system": " Be brief. "}
    assert texts(prepared(tmp_path, [twice])) == expected


@pytest.mark.parametrize(
    "form",
    [
        {"question": "q", "response": "a"},
        {"Instruction": "q", "Output": "a"},
        {"prompt": "q", "completion": "a"},
        {"messages": ASKED},
    ],
)
@pytest.mark.parametrize("names", [("System", "Tools"), ("SYSTEM_PROMPT", " Functions ")])
@pytest.mark.parametrize("is_named", [True, False])
def test_what_stands_beside_a_question_is_read_in_any_case_as_it_is_asked(tmp_path, form, names, is_named):
    row = {**form, names[0]: "Be brief.", names[1]: [{"name": "f"}]}
    usual = {**form, "system": "Be brief.", "tools": [{"name": "f"}]}
    if names[1] == " Functions ":
        usual |= {"tools": [{"type": "function", "function": {"name": "f"}}]}
    columns = {}
    if is_named:
        pair = dict(zip(("dataset_prompt_field", "dataset_completion_field"), form, strict=False))
        columns = pair if len(pair) == 2 else {"dataset_text_field": "messages"}
    found = prepared(tmp_path, [row], **columns)
    assert not any("not read" in note for note in found.table.counts["notes"])
    (learnt,) = texts(found)
    assert [learnt] == texts(prepared(tmp_path, [usual], **columns)) and "### System: Be brief." in learnt[0]
    assert '"name": "f"' in learnt[0]
    messages, tools = question_of(row, next(iter(form)))
    assert messages[0] == {"role": "system", "content": "Be brief."} and list(tools) == usual["tools"]


@pytest.mark.parametrize("name", ["Input", " CONTEXT ", "input"])
def test_what_an_instruction_is_about_is_read_in_any_case_as_it_is_asked(tmp_path, name):
    row = {"instruction": "Add.", name: "1, 2", "output": "3"}
    found = prepared(tmp_path, [row])
    assert not any("not read" in note for note in found.table.counts["notes"])
    assert "### Human: Add.\n\n1, 2" in texts(found)[0][0]
    assert question_of(row, "instruction")[0][0]["content"] == "Add.\n\n1, 2"


def test_a_column_of_the_usual_name_counts_before_one_in_another_case(tmp_path):
    row = {"question": "q", "response": "a", "System": "Shout.", "system": "Be brief.", "SYSTEM": "Sing."}
    assert "### System: Be brief.\n" in texts(prepared(tmp_path, [row]))[0][0]
    assert question_of(row, "question")[0][0]["content"] == "Be brief."


@pytest.mark.parametrize("value", [datetime(2024, 1, 1), Decimal("1.5"), b"\xff"])
@pytest.mark.parametrize("place", ["arguments", "answer"])
def test_a_value_of_a_tool_that_json_does_not_have_is_named_by_its_row(tmp_path, value, place):
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"x": value}}}]}
    told = call if place == "arguments" else {"role": "tool", "content": {"x": value}}
    asked, answer = ({"role": each["role"], "value": each["content"]} for each in ASKED)  # a column has one type
    parquet.write_table(Table.from_pylist([{"messages": [asked, told, answer]}]), tmp_path / "rows.parquet")
    with pytest.raises(
        UserError, match=r"^row 1 of .*rows.parquet.*: data of a tool holds .* of type \w+, which JSON does not have"
    ):
        prepare(str(tmp_path / "rows.parquet"), "train", byte_chat_tokenizer(), SftSettings(), show_progress=False)


@pytest.mark.parametrize("nothing", [None, math.nan, [], "", "[]", "null", "None"])
def test_no_tools_are_none_however_they_are_written(tmp_path, nothing):
    asked, answered = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    rows = [{"messages": [asked, {**answered, "tool_calls": nothing}], "tools": nothing}]
    assert texts(prepared(tmp_path, rows)) == texts(prepared(tmp_path, [{"messages": [asked, answered]}]))


def test_a_table_of_questions_whose_first_line_is_a_row_says_what_its_columns_are(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("What is the height of the tower in metres?,330\nAnd its weight?,10100 t\n")
    with pytest.raises(UserError, match=r"line 1 does not name .* such as --dataset_columns prompt completion$"):
        prepare(str(file), "train", byte_chat_tokenizer(None), SftSettings(max_seq_length=64), show_progress=False)
