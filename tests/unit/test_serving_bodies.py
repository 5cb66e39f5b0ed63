"""The bodies of requests: what is wrong is named, and what would do nothing is refused."""

import pytest

from isotune.serving.bodies import Chat, Completion, ToClassify, read_body
from isotune.serving.limits import Refused

HI = {"messages": [{"role": "user", "content": "Hi"}]}


@pytest.mark.parametrize(
    ("kind", "body", "field", "says"),
    [
        (Chat, HI | {"temprature": 0}, "temprature", "temprature is not a key of this request"),
        (Chat, HI | {"temperature": 3}, "temperature", "less than or equal to 2"),
        (Chat, HI | {"temperature": "warm"}, "temperature", "should be a valid number"),
        (Chat, HI | {"top_p": 0}, "top_p", "greater than 0"),
        (Chat, HI | {"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        (Chat, HI | {"n": 2}, "n", "should be 1"),
        (Chat, HI | {"logprobs": True}, "logprobs", "should be False"),
        (Chat, HI | {"frequency_penalty": 0.5}, "frequency_penalty", "should be 0"),
        (Chat, HI | {"tools": [{"type": "function"}]}, "tools", "at most 0 items"),
        (Chat, HI | {"response_format": {"type": "json_object"}}, "response_format.type", "should be 'text'"),
        (Chat, HI | {"stop": ["a"] * 5}, "stop", "at most 4 items"),
        (Chat, HI | {"stop": ["a" * 1_001]}, "stop", "at most 1000 characters"),
        (Chat, {"messages": []}, "messages", "at least 1 item"),
        (Chat, {}, "messages", "Field required"),
        (Chat, [], None, "valid dictionary"),
        (Completion, {"prompt": [1, 2]}, "prompt.0", "valid string"),
        (Completion, {"prompt": "a", "echo": True}, "echo", "should be False"),
        (ToClassify, {}, None, 'say one of "text", "texts" and "pairs"'),
        (ToClassify, {"text": "a", "texts": ["b"]}, None, 'say one of "text", "texts" and "pairs"'),
        (ToClassify, {"texts": []}, "texts", "at least 1 item"),
        (ToClassify, {"texts": [1]}, "texts.0", "valid string"),
        (ToClassify, {"pairs": [["a"]]}, "pairs.0", "at least 2 items"),
        (ToClassify, {"texts": ["a"], "text_pair": "b"}, None, '"text_pair" stands beside "text"'),
    ],
)
def test_a_mistake_is_one_sentence_that_names_the_key(kind, body, field, says):
    with pytest.raises(Refused) as refused:
        read_body(kind, body)
    error = refused.value.as_json()["error"]
    assert (refused.value.status, error["param"] and error["param"].startswith(field or ""), error["type"]) == (
        400, None if field is None else True, "invalid_request_error",
    )  # fmt: skip
    assert says in error["message"] and "\n" not in error["message"]


def test_what_openai_s_clients_send_of_their_own_is_taken():
    body = read_body(Chat, HI | {"user": "me", "metadata": {}, "store": False, "n": 1, "presence_penalty": 0.0})
    assert (body.temperature, body.stream, body.wants_usage, body.stop_words) == (0.0, False, False, ())
    body = read_body(Chat, HI | {"stop": "\n", "stream_options": {"include_usage": True}, "temperature": 1})
    assert (body.temperature, body.wants_usage, body.stop_words) == (1.0, True, ("\n",))


@pytest.mark.parametrize("kind", [Chat, Completion])
def test_null_is_the_default_of_every_key_that_may_be_left_out(kind):
    needed = HI if kind is Chat else {"prompt": "a"}
    nothing = {name: None for name, key in kind.model_fields.items() if not key.is_required()}
    assert read_body(kind, needed | nothing) == read_body(kind, needed)
    assert not read_body(kind, needed | {"stream_options": {"include_usage": None}}).wants_usage


@pytest.mark.parametrize(
    ("body", "columns"),
    [
        ({"text": "a"}, (["a"], None)),
        ({"texts": ["a", "b"]}, (["a", "b"], None)),
        ({"text": "a", "text_pair": "b"}, (["a"], ["b"])),
        ({"pairs": [["a", "b"], ["c", ""]]}, (["a", "c"], ["b", ""])),
    ],
)
def test_texts_come_in_four_forms(body, columns):
    assert read_body(ToClassify, body).columns() == columns


def test_a_refusal_that_quotes_half_of_a_surrogate_pair_can_be_sent():
    error = Refused(400, "bad", "it has \ud800", "messages.\ud800").as_json()["error"]
    assert (error["message"], error["param"]) == ("it has ?", "messages.?")
    assert Refused(400, "bad", "it has").as_json()["error"]["param"] is None
