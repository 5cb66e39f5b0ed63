"""The answers of a chat template against a slow reference that renders every prefix by transformers' own call."""

from collections import Counter
from pathlib import Path

import pytest
import trl
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tests.chat_tokenizers import TEMPLATES, byte_chat_tokenizer
from tokenizers.normalizers import NFKD, Lowercase, Replace, Sequence

from isotune.data.sft.chat_format import ChatFormat
from isotune.data.sft.messages import example_of
from isotune.data.sft.tokenization import ConversationEncoder

FAMILIES = ["chatml", "llama3", "mistral", "gemma", "phi", "qwen_thinking", "trims_earlier", "chatml_generation"]

PIECES = st.sampled_from(
    [
        "a",
        "b a",
        " a",
        "a ",
        "\n",
        "\n\n",
        "aa",
        "ba",
        "é",
        "🙂",
        "<think>",
        "</think>",
        "user",
        "### Human:",
        "\nassistant",
    ]
)
TEXT = st.lists(PIECES, min_size=1, max_size=4).map("".join)
# An answer that begins with a line end may share a token with the line end of its header: such tokens are counted, and
# tests/numerics/test_masks.py looks at them.
ANSWER = TEXT.filter(lambda text: text.strip() and not text[0].isspace() and "think>" not in text)
TURN = st.tuples(TEXT, ANSWER, st.one_of(st.none(), ANSWER))
TURNS = st.tuples(st.one_of(st.none(), TEXT), st.lists(TURN, min_size=1, max_size=4))


def messages_of(system, turns, family):
    messages = [{"role": "system", "content": system}] if system and family != "gemma" else []
    for question, answer, reasoning in turns:
        thought = {"reasoning_content": reasoning} if reasoning and family == "qwen_thinking" else {}
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer} | thought]
    return messages


def documents_of(encoder, conversations):
    """(tokens, mask) of each document."""
    encoded = encoder.encode(conversations)
    spans = zip(encoded.starts[:-1], encoded.starts[1:], strict=True)
    return [(encoded.input_ids[s:e].tolist(), encoded.supervised[s:e].tolist()) for s, e in spans]


def answers_in(documents):
    """(tokens before, tokens of the answer) of each run of supervised tokens."""
    found = []
    for tokens, mask in documents:
        starts = [at for at in range(len(mask)) if mask[at] and not (at and mask[at - 1])]
        for start in starts:
            end = next((at for at in range(start, len(mask)) if not mask[at]), len(mask))
            found.append((tuple(tokens[:start]), tuple(tokens[start:end])))
    return found


def rendered(tokenizer, messages, **how):
    return tokenizer.apply_chat_template(messages, **how)["input_ids"]


def reference(tokenizer, messages, **how):
    """What asks for each answer, and the tokens that the template writes for it, each prefix rendered alone."""
    expected = []
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            asked = rendered(tokenizer, messages[:number], add_generation_prompt=True, **how)
            answered = rendered(tokenizer, messages[: number + 1], **how)
            assert answered[: len(asked)] == asked
            expected.append((tuple(asked), tuple(answered[len(asked) :])))
    return expected


def without_closing(pair, closing):
    """An answer without what the template writes at the end of a whole text."""
    before, answer = pair
    return before, answer[: -len(closing)] if closing and answer[-len(closing) :] == tuple(closing) else answer


many = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    tokenizer = byte_chat_tokenizer(request.param, merges=True, closes=request.param in ("phi", "chatml"))
    encoder = ConversationEncoder(tokenizer)
    encoder.format.apply(tokenizer)  # as a run does: with the day that training wrote
    return request.param, tokenizer, encoder


@many
@given(conversation=TURNS)
@example(conversation=("a", [("b", "a", "b"), ("a", "a \n", None), ("b", "b ", "a")]))
def test_every_answer_is_learnt_once_behind_exactly_the_tokens_that_ask_for_it(family, conversation):
    name, tokenizer, encoder = family
    messages = messages_of(*conversation, name)
    documents = documents_of(encoder, encoder.conversations(example_of(messages)))
    closing = [tokenizer.eos_token_id] if name == "phi" else []
    if name == "chatml_generation":  # its own marks leave out the line end behind an answer
        newline = rendered(tokenizer, messages)[-1:]
        expected = [(before, answer[: -len(newline)]) for before, answer in reference(tokenizer, messages)]
    else:
        expected = [without_closing(pair, closing) for pair in reference(tokenizer, messages)]
    assert Counter(without_closing(pair, closing) for pair in answers_in(documents)) == Counter(expected)


@many
@given(conversation=TURNS)
def test_a_document_is_what_the_stock_call_makes_of_the_conversation_up_to_its_last_answer(family, conversation):
    name, tokenizer, encoder = family
    messages = messages_of(*conversation, name)
    whole = [rendered(tokenizer, messages[: n + 1]) for n, m in enumerate(messages) if m["role"] == "assistant"]
    documents = documents_of(encoder, encoder.conversations(example_of(messages)))
    assert documents[0][0] == whole[-1]
    assert all(tokens in whole for tokens, _ in documents)
    if name in ("chatml", "llama3", "gemma", "phi", "chatml_generation"):
        assert len(documents) == 1


@many
@given(conversation=TURNS)
def test_the_last_answer_alone_and_everything(family, conversation):
    name, tokenizer, encoder = family
    messages = messages_of(*conversation, name)
    all_of_it = answers_in(documents_of(encoder, encoder.conversations(example_of(messages))))
    last = answers_in(documents_of(encoder, encoder.conversations(example_of(messages), "last")))
    assert len(last) == 1 and last[0] in all_of_it
    assert last[0][0] == tuple(rendered(tokenizer, messages[:-1], add_generation_prompt=True))
    ((tokens, mask),) = documents_of(encoder, encoder.conversations(example_of(messages), "everything"))
    assert tokens == rendered(tokenizer, messages) and all(mask)


@many
@given(conversation=TURNS, marks=st.lists(st.booleans(), min_size=4, max_size=4))
def test_a_marked_answer_stays_in_the_text_and_out_of_the_loss(family, conversation, marks):
    name, _, encoder = family
    messages = messages_of(*conversation, name)
    answers = [message for message in messages if message["role"] == "assistant"]
    marked = [dict(m) | ({"weight": int(marks[answers.index(m)])} if m in answers else {}) for m in messages]
    kept = [learn for _, learn in zip(answers, [marks[answers.index(m)] for m in answers], strict=True)]
    plain = answers_in(documents_of(encoder, encoder.conversations(example_of(messages))))
    found = answers_in(documents_of(encoder, encoder.conversations(example_of(marked))))
    assert len(found) == sum(kept)
    if name not in ("phi", "mistral"):  # whose last answer is closed, or whose system message moves
        assert not Counter(found) - Counter(plain)


@many
@given(conversation=TURNS)
def test_a_prompt_is_that_of_the_stock_call(family, conversation):
    name, tokenizer, encoder = family
    asked = messages_of(*conversation, name)[:-1]
    expected = rendered(tokenizer, asked, add_generation_prompt=True)
    assert encoder.prompt_tokens(encoder.prompt(asked)) == expected


@many
@given(conversation=TURNS, closes=st.booleans())
def test_guanacos_form_as_a_template_makes_the_tokens_of_training(conversation, closes):
    tokenizer = byte_chat_tokenizer(merges=True, closes=closes)
    encoder = ConversationEncoder(tokenizer)
    ChatFormat.of("auto", tokenizer).apply(tokenizer)
    assert ConversationEncoder(tokenizer).fingerprint == encoder.fingerprint, "the saved form is known again"
    messages = [dict(m) for m in messages_of(*conversation, "guanaco")]
    for message in messages:  # special tokens that somebody wrote out are text in training, which no template can say
        message["content"] = message["content"].replace("think>", "")
    (trained,) = encoder.conversations(example_of(messages))
    ((tokens, mask),) = documents_of(encoder, [trained])
    tokens, before = [*encoder.prefix.tolist(), *tokens], len(encoder.prefix)
    assert rendered(tokenizer, messages) == tokens
    asked = rendered(tokenizer, messages[:-1], add_generation_prompt=True)
    first_of_answer = before + max(at for at in range(len(mask)) if mask[at] and not (at and mask[at - 1]))
    assert asked == tokens[:first_of_answer] == encoder.prompt_tokens(encoder.prompt(messages[:-1]))


PARAMETERS = {"type": "object", "properties": {"at": {"type": "string", "description": "the place"}}}
TOOLS = [{"type": "function", "function": {"name": "tide", "description": "hours", "parameters": PARAMETERS}}]
# templates of models that call tools: ours, and some that TRL ships
OF_TOOLS = ["chatml", "qwen2_5", "qwen3", "qwen3_instruct_2507", "llama3_1", "glm4moe", "lfm2_v2"]
CALL = st.tuples(st.one_of(st.none(), ANSWER), TEXT, TEXT)  # reasoning, an argument, what the tool answers
ERRAND = st.tuples(TEXT, st.lists(CALL, max_size=2), ANSWER, st.one_of(st.none(), ANSWER))
ERRANDS = st.tuples(st.one_of(st.none(), TEXT), st.lists(ERRAND, min_size=1, max_size=3))


def errands_of(system, errands):
    messages = [{"role": "system", "content": system}] if system else []
    for question, calls, answer, reasoning in errands:
        messages.append({"role": "user", "content": question})
        for thought, argument, said in calls:
            call = {"type": "function", "function": {"name": "tide", "arguments": {"at": argument}}}
            asks = {"role": "assistant", "content": "", "tool_calls": [call]}
            asks |= {"reasoning_content": thought} if thought else {}
            messages += [asks, {"role": "tool", "content": said}]
        own = {"reasoning_content": reasoning} if reasoning else {}
        messages.append({"role": "assistant", "content": answer} | own)
    return messages


@pytest.fixture(scope="module", params=OF_TOOLS)
def of_tools(request):
    tokenizer = byte_chat_tokenizer(merges=True)
    folder = TEMPLATES if request.param == "chatml" else Path(trl.__file__).parent / "chat_templates"
    tokenizer.chat_template = (folder / f"{request.param}.jinja").read_text("utf-8")
    encoder = ConversationEncoder(tokenizer)
    encoder.format.apply(tokenizer)
    return tokenizer, encoder


@many
@given(conversation=ERRANDS, with_tools=st.booleans())
@example(
    conversation=("a", [("b", [("a", "x", "1"), (None, "y", "2")], "ba", "b"), ("a", [], "b", None)]), with_tools=1
)
def test_calls_reasoning_and_answers_are_learnt_once_behind_what_asks_for_them(of_tools, conversation, with_tools):
    tokenizer, encoder = of_tools
    found = example_of(errands_of(*conversation), tools=TOOLS if with_tools else None)
    messages, tools = list(found.messages), list(found.tools or ()) or None
    documents = documents_of(encoder, encoder.conversations(found))
    assert Counter(answers_in(documents)) == Counter(reference(tokenizer, messages, tools=tools))
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    whole = [rendered(tokenizer, messages[: number + 1], tools=tools) for number in answers]
    assert all(tokens in whole for tokens, _ in documents) and documents[0][0] == whole[-1]


@many
@given(conversation=TURNS)
@example(conversation=("É", [("né", "éa ﬁ", None), ("ﬁ", "é", None)]))
def test_a_tokenizer_that_rewrites_texts_learns_the_same_answers(conversation):
    tokenizer = byte_chat_tokenizer("chatml", merges=True)
    # one character becomes several, or several one, so that only the tokenizer's own offsets are right
    tokenizer.backend_tokenizer.normalizer = Sequence([NFKD(), Lowercase(), Replace("aa", "b")])
    encoder = ConversationEncoder(tokenizer)
    found = example_of(messages_of(*conversation, "chatml"))
    documents = documents_of(encoder, encoder.conversations(found))
    assert not encoder.locate(["a"], rendered=True).in_bytes
    assert Counter(answers_in(documents)) == Counter(reference(tokenizer, list(found.messages)))


def test_every_fixture_is_tried():
    assert {*FAMILIES, "opens_thinking"} == {path.stem for path in TEMPLATES.glob("*.jinja")}
