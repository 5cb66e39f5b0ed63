"""The supervised mask against a slow reference that looks at one character at a time."""

import json
from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from isotune.data.documents import Documents
from isotune.data.sft.conversations import parse_text, render_example
from isotune.data.sft.messages import example_of, exchange
from isotune.data.sft.preparation import ANSWER_CUT, NO_ANSWER, TOO_LONG, SftSettings, prepare
from isotune.data.sft.tokenization import ConversationEncoder, fit

TOKENIZERS = {"opt": "tokenizers/opt", "stories260K": "checkpoints/stories260K"}

FRAGMENTS = st.sampled_from(
    [
        *("### Human:", "### Assistant:", "###Human:", "###Assistant:", "### Human", "#### Assistant:", "##"),
        *("###  Human:", "### assistant:", "### Assistant::", "### System:", "Assistant:", ":"),
        *("\n", "\r\n", " ", "  ", "\t", "\u00a0", "\u3000", "\u2028", "\x85", "\n\n\n"),
        *("</s>", "<s>", "<pad>", "<unk>", "▁", "Ġ"),
        *("😀", "👩‍👩‍👧‍👦", "é", "e\u0301", "漢字", "ب", "\u200b", "\ufeff", "\x00"),
        *("hello", " a longer answer, with commas.", "'s", "1234567", "don't"),
    ]
)
CONTENT = st.lists(st.one_of(FRAGMENTS, st.text(max_size=8)), max_size=6).map("".join)
TURNS = st.lists(st.one_of(FRAGMENTS, CONTENT, st.sampled_from(["### Assistant:", "### Human:"])), max_size=14)
TEXT = TURNS.map("".join)
ROLES = st.sampled_from(["system", "user", "human", "assistant", "gpt"])
MESSAGES = st.lists(st.tuples(ROLES, CONTENT), max_size=6)


@dataclass(frozen=True)
class Tools:
    tokenizer: object
    encoder: ConversationEncoder


@pytest.fixture(scope="module", params=list(TOKENIZERS))
def tools(request, shared_data) -> Tools:
    """One tokenizer that is placed by bytes, and one that gives characters and has byte fallback."""
    tokenizer = AutoTokenizer.from_pretrained(shared_data / TOKENIZERS[request.param])
    return Tools(tokenizer, ConversationEncoder(tokenizer))


@pytest.fixture(scope="module")
def opt_encoder(shared_data) -> ConversationEncoder:
    return ConversationEncoder(AutoTokenizer.from_pretrained(shared_data / TOKENIZERS["opt"]))


def scan_text(text: str) -> list[set[int]]:
    """The characters of each answer, found by walking through the text with a state."""
    answers: list[set[int]] = []
    speaker = None
    at = 0
    while at < len(text):
        if text.startswith("###", at) and not (at and text[at - 1] == "#"):
            word = at + 3 + (text[at + 3 : at + 4] == " ")
            name = next((name for name in ("Human:", "Assistant:") if text.startswith(name, word)), None)
            if name:
                speaker = name
                if speaker == "Assistant:":
                    answers.append(set())
                at = word + len(name)
                continue
        if speaker == "Assistant:":
            answers[-1].add(at)
        at += 1
    return without_space_at_end(text, answers)


def scan_messages(messages: list[tuple[str, str]]) -> tuple[str, list[set[int]]]:
    """The text built character by character, each remembered as part of an answer or not."""
    headers = {"system": "### System:", "user": "### Human:", "human": "### Human:"}
    text, answers = "", []
    for number, (role, content) in enumerate(messages):
        text += ("\n" if number else "") + headers.get(role, "### Assistant:")
        if role in ("assistant", "gpt"):
            answers.append(set())
        for character in " " + content:
            if role in ("assistant", "gpt"):
                answers[-1].add(len(text))
            text += character
    return text, without_space_at_end(text, answers)


def without_space_at_end(text: str, answers: list[set[int]]) -> list[set[int]]:
    for answer in answers:
        while answer and text[max(answer)].isspace():
            answer.remove(max(answer))
    return [answer for answer in answers if answer]


def reference(tools: Tools, text: str, answers: list[set[int]]) -> tuple[list[int], list[bool]]:
    """Tokens and mask of one whole conversation from the public call of the tokenizer."""
    if not answers:
        return [], []
    supervised_characters = set().union(*answers)
    text = text[: max(map(max, answers)) + 1]
    called = tools.tokenizer(text, return_offsets_mapping=True, split_special_tokens=True)
    mask = [
        any(character in supervised_characters for character in range(start, end)) and token != eos(tools)
        for token, (start, end) in zip(called["input_ids"], called["offset_mapping"], strict=True)
    ]
    return [*called["input_ids"], eos(tools)], [*mask, True]


def eos(tools: Tools) -> int:
    return tools.tokenizer.eos_token_id


def reference_pieces(ids: list[int], mask: list[bool], max_seq_length: int, overlong: str, bos: list[int]):
    """What is left of a conversation, as (tokens, mask) pairs, by plain loops."""
    if len(ids) <= max_seq_length:
        pieces = [(ids, mask)]
    elif overlong == "truncate":
        pieces = [(ids[:max_seq_length], mask[:max_seq_length])]
    elif overlong == "drop":
        pieces = []
    else:
        body, body_mask, pieces = ids[len(bos) :], mask[len(bos) :], []
        while body:
            room = max_seq_length - len(bos)
            pieces.append((bos + body[:room], [False] * len(bos) + body_mask[:room]))
            body, body_mask = body[room:], body_mask[room:]
    pieces = [(piece, [False, *piece_mask[1:]]) for piece, piece_mask in pieces]
    return [(piece, piece_mask) for piece, piece_mask in pieces if any(piece_mask)]


def as_pairs(documents: Documents) -> list[tuple[list[int], list[bool]]]:
    return [
        (documents.input_ids[start:end].tolist(), documents.supervised[start:end].tolist())
        for start, end in zip(documents.starts[:-1], documents.starts[1:], strict=True)
    ]


def encoded_pairs(tools: Tools, conversation, max_seq_length: int, overlong: str):
    encoded = tools.encoder.encode([conversation] if conversation.answers else [])
    return as_pairs(fit(encoded, tools.encoder.prefix, max_seq_length, overlong)[0])


odd_text = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@odd_text
@given(text=TEXT, max_seq_length=st.integers(3, 40), overlong=st.sampled_from(["truncate", "split", "drop"]))
@example(text="### Human: hi", max_seq_length=40, overlong="truncate")
@example(text="### Human: hi### Assistant:yes ### Human: and?###Assistant:no", max_seq_length=40, overlong="split")
@example(text="### Human: a\r\n### Assistant: b\r\n\r\n### Human: c\r\n", max_seq_length=40, overlong="truncate")
@example(text="### Assistant::) 😀 </s>", max_seq_length=40, overlong="split")
@example(text="### Human:\n### Assistant:\n### Human:\n### Assistant: x", max_seq_length=40, overlong="truncate")
def test_text_form_supervises_exactly_what_a_walk_through_its_characters_finds(tools, text, max_seq_length, overlong):
    expected = reference(tools, text, scan_text(text))
    pieces = reference_pieces(*expected, max_seq_length, overlong, tools.encoder.prefix.tolist())
    assert encoded_pairs(tools, parse_text(text), max_seq_length, overlong) == pieces


@odd_text
@given(messages=MESSAGES, max_seq_length=st.integers(3, 60), overlong=st.sampled_from(["truncate", "split", "drop"]))
@example(messages=[("user", "q"), ("assistant", "a ### Human: b ### Assistant: c")], max_seq_length=60, overlong="drop")
@example(messages=[("user", "### Assistant: mine"), ("assistant", "ok")], max_seq_length=60, overlong="drop")
def test_header_text_inside_a_message_never_becomes_a_turn(tools, messages, max_seq_length, overlong):
    text, answers = scan_messages(messages)
    expected = reference(tools, text, answers)
    pieces = reference_pieces(*expected, max_seq_length, overlong, tools.encoder.prefix.tolist())
    conversation = render_example(example_of([{"role": role, "content": content} for role, content in messages]))
    assert encoded_pairs(tools, conversation, max_seq_length, overlong) == pieces


@odd_text
@given(text=TEXT)
def test_training_on_the_last_answer_supervises_that_one_alone(tools, text):
    answers = scan_text(text)
    ids, mask = reference(tools, text, answers[-1:])
    assert encoded_pairs(tools, parse_text(text, "last"), 100_000, "drop") == ([(ids, mask)] if ids else [])


@odd_text
@given(text=TEXT)
def test_each_whole_document_holds_one_supervised_eos_at_its_end_and_no_supervised_first_token(tools, text):
    for ids, mask in encoded_pairs(tools, parse_text(text), 100_000, "drop"):
        eos_supervised = [at for at, token in enumerate(ids) if token == eos(tools) and mask[at]]
        assert eos_supervised == [len(ids) - 1]
        assert not mask[0]


@odd_text
@given(texts=st.lists(TEXT, max_size=4))
def test_places_from_byte_counts_touch_the_characters_of_the_tokenizers_own_offsets(opt_encoder, texts):
    by_bytes, by_characters = opt_encoder.locate(texts), opt_encoder.locate_by_characters(texts)
    assert by_bytes.in_bytes and not by_characters.in_bytes
    assert by_bytes.ids.tolist() == by_characters.ids.tolist()
    assert by_bytes.counts.tolist() == by_characters.counts.tolist()
    character_of_byte = [at for at, character in enumerate("".join(texts)) for _ in character.encode()]
    assert [character_of_byte[at] for at in by_bytes.begins] == by_characters.begins.tolist()
    assert [character_of_byte[at - 1] + 1 for at in by_bytes.ends] == by_characters.ends.tolist()


def test_a_conversation_of_100_000_characters_is_masked_like_a_short_one(tools):
    answer = "Строка 😀 of words, " * 5_200
    text = f"### Human: Write on.\n### Assistant: {answer}\n### Human: More?### Assistant: {answer}"
    assert len(text) > 100_000
    expected = reference(tools, text, scan_text(text))
    assert encoded_pairs(tools, parse_text(text), 1_000_000, "drop") == [expected]
    pieces = reference_pieces(*expected, 1_024, "split", tools.encoder.prefix.tolist())
    assert encoded_pairs(tools, parse_text(text), 1_024, "split") == pieces


def test_an_eos_written_out_in_a_text_stays_ordinary_text_and_is_counted(tools):
    conversation = render_example(exchange("a</s>", "b</s> c"))
    encoded = tools.encoder.encode([conversation])
    assert encoded.columns["special_texts"].tolist() == [True]
    assert (encoded.input_ids == eos(tools)).sum() == 1
    decoded = tools.tokenizer.decode(encoded.input_ids[:-1].tolist())
    assert decoded == "### Human: a</s>\n### Assistant: b</s> c"


def test_tokens_across_an_answers_edge_are_supervised_and_counted(shared_data):
    tokenizer = AutoTokenizer.from_pretrained(shared_data / TOKENIZERS["opt"])
    encoded = ConversationEncoder(tokenizer).encode([parse_text("### Human: hi ### Assistant::) yes")])
    tokens = tokenizer.convert_ids_to_tokens(encoded.input_ids.tolist())
    supervised = [token for token, marked in zip(tokens, encoded.supervised, strict=True) if marked]
    assert supervised == ["::", ")", "Ġyes", "</s>"]
    assert encoded.columns["straddling_tokens"].tolist() == [1]


@pytest.mark.parametrize("split", ["test", pytest.param("train", marks=pytest.mark.slow)])
@pytest.mark.parametrize("overlong", ["truncate", "split", pytest.param("drop", marks=pytest.mark.slow)])
def test_every_row_of_real_guanaco_has_the_reference_mask_and_counts(shared_data, split, overlong):
    tokenizer = AutoTokenizer.from_pretrained(shared_data / TOKENIZERS["opt"])
    tools = Tools(tokenizer, ConversationEncoder(tokenizer))
    prepared = prepare(
        str(shared_data / "guanaco"), split, tokenizer, SftSettings(overlong=overlong), show_progress=False
    )
    expected, source_rows, tally = [], [], Counter()
    lines = (shared_data / "guanaco" / f"{split}.jsonl").read_text("utf-8").splitlines()
    for row, line in enumerate(lines):
        text = json.loads(line)["text"]
        ids, mask = reference(tools, text, scan_text(text))
        pieces = reference_pieces(ids, mask, 1_024, overlong, [2]) if ids else []
        expected += pieces
        source_rows += [row] * len(pieces)
        tally["kept"] += bool(pieces)
        tally["cut"] += len(ids) > 1_024 and bool(pieces)
        tally[NO_ANSWER] += not ids
        tally["dropped"] += bool(ids) and not pieces

    assert as_pairs(prepared.documents) == expected
    assert prepared.documents.source_rows.tolist() == source_rows
    counts = prepared.table.counts
    assert counts["read"] == {"train": 707, "test": 90}[split]
    assert (counts["kept"], counts["truncated"] + counts["split"]) == (tally["kept"], tally["cut"])
    dropped_for = TOO_LONG if overlong == "drop" else ANSWER_CUT
    assert (counts["dropped"][NO_ANSWER], counts["dropped"][dropped_for]) == (tally[NO_ANSWER], tally["dropped"])
    assert counts["read"] == counts["kept"] + sum(counts["dropped"].values())
    assert counts["tokens"] == sum(len(ids) for ids, _ in expected)
    assert counts["supervised_tokens"] == sum(sum(mask) for _, mask in expected)


def test_two_real_conversations_end_on_a_human_turn_which_is_cut(shared_data):
    tokenizer = AutoTokenizer.from_pretrained(shared_data / TOKENIZERS["opt"])
    guanaco = str(shared_data / "guanaco")
    prepared = prepare(guanaco, "train", tokenizer, SftSettings(), show_progress=False)
    assert prepared.table.counts["turns_cut"] == 2
