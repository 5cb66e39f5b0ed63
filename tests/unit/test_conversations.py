"""Conversations in both forms, on examples that can be checked by eye."""

import pytest

from isotune.data.sft.conversations import parse_text, render_messages, render_prompt


def answers(conversation) -> list[str]:
    return [conversation.text[start:end] for start, end in conversation.answers]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("### Human: a\n### Assistant: b", [" b"]),
        ("### Human: a ### Assistant: b ### Human: c ### Assistant: d", [" b", " d"]),
        ("### Human: a### Assistant: b### Human: c### Assistant: d", [" b", " d"]),
        ("###Human:a###Assistant:b", ["b"]),
        ("### Human: a\r\n### Assistant: b\r\n\r\n", [" b"]),
        ("### Human: a\n### Assistant:\n\nb  \n c\t\n### Human: d", ["\n\nb  \n c"]),
        ("Be kind.\n### Assistant: b", [" b"]),
        (
            "### Human: a\n### Assistant: use #### Assistant: or ### assistant:",
            [" use #### Assistant: or ### assistant:"],
        ),
    ],
)
def test_an_answer_reaches_from_its_colon_to_the_next_header_less_the_space_before_it(text, found):
    assert answers(parse_text(text)) == found


@pytest.mark.parametrize(
    ("text", "kept", "turns_cut"),
    [
        ("### Human: a\n### Assistant: b\n### Human: c", "### Human: a\n### Assistant: b", 1),
        ("### Human: a\n### Assistant: b\n### Human: c\n### Assistant:  \n", "### Human: a\n### Assistant: b", 2),
        ("### Human: a", "", 1),
        ("### Human: a ### Assistant:", "", 2),
        ("no header at all", "", 0),
        ("", "", 0),
    ],
)
def test_the_text_ends_where_its_last_answer_ends(text, kept, turns_cut):
    conversation = parse_text(text)
    assert (conversation.text, conversation.turns_cut) == (kept, turns_cut)


def test_an_empty_answer_between_others_is_no_answer():
    assert answers(parse_text("### Assistant: ### Human: a ### Assistant: b")) == [" b"]


def test_training_on_the_last_keeps_the_text_and_marks_one_answer():
    conversation = parse_text("### Human: a ### Assistant: b ### Human: c ### Assistant: d", "last")
    assert answers(conversation) == [" d"]
    assert conversation.text.startswith("### Human: a ### Assistant: b")


def test_messages_are_written_in_the_text_form():
    conversation = render_messages(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c"},
        ]
    )
    assert conversation.text == "### System: Be brief.\n### Human: a\n### Assistant: b"
    assert answers(conversation) == [" b"]
    assert conversation.turns_cut == 1


def test_the_other_spelling_of_messages_means_the_same():
    usual = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    other = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    assert render_messages(usual) == render_messages(other)


def test_both_forms_of_one_conversation_agree():
    messages = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b")) * 2]
    rendered = render_messages(messages)
    assert parse_text(rendered.text) == rendered


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ([{"role": "user", "content": "a"}, {"role": "narrator", "content": "b"}], "message 2 has the role 'narrator'"),
        ([{"role": "user", "content": None}], "message 1 has nothing for its content"),
        ([{"role": "user", "content": [{"type": "image"}]}], "message 1 has a part of type 'image'"),
        (["hello"], "message 1 is a str"),
        ([{"content": "a"}], "message 1 has the role None"),
    ],
)
def test_a_message_that_is_none_is_named(messages, sentence):
    with pytest.raises(ValueError, match=sentence):
        render_messages(messages)


def test_a_prompt_is_the_trained_text_up_to_its_answer():
    question = [{"role": "user", "content": "a"}]
    trained = render_messages([*question, {"role": "assistant", "content": "b"}])
    assert render_prompt("a") == render_prompt(question) == trained.text[: trained.answers[0][0]]


def test_a_prompt_of_several_turns_is_the_trained_text_up_to_its_last_answer():
    so_far = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    trained = render_messages([*so_far, {"role": "assistant", "content": "d"}], "last")
    assert render_prompt(so_far) == trained.text[: trained.answers[0][0]]
