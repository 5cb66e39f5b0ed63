"""From conversations to tokens with their mask, by the character offsets of the answers, and to documents that fit.

No template token is ever searched for: `### Assistant:` becomes other tokens after a space than after a line end.

A byte-level vocabulary (GPT-2, OPT, Llama 3, Qwen) splits the UTF-8 bytes of a text into tokens without changing any,
so the running total of the tokens' byte counts gives their offsets. That halves the cost: character offsets from the
tokenizer take as long again as tokenization. For any other vocabulary the tokenizer's own offsets are used.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from isotune.config.recipes import Overlong
from isotune.data.documents import Documents, digest, starts_of, sums_of
from isotune.data.sft.conversations import Conversation
from isotune.data.tokenizer import FastTokenizer, add_special_tokens
from isotune.io.errors import UserError


@dataclass(frozen=True)
class LocatedTokens:
    """The tokens of texts that lie end to end, and where each stands in them."""

    ids: np.ndarray  # int32 [tokens]
    counts: np.ndarray  # int64 [texts]; tokens of each text
    begins: np.ndarray  # int64 [tokens]; in bytes or in characters of the joined texts
    ends: np.ndarray
    text_starts: np.ndarray  # int64 [texts + 1]; in the same unit
    in_bytes: bool  # whether that unit is the byte of UTF-8, else the character

    def positions(self, number: int, text: str, characters: Sequence[int]) -> np.ndarray:
        """Where some characters of text `number`, in their order, stand in the joined texts: int64 [characters]."""
        within = np.array(characters, np.int64)
        if self.in_bytes and not text.isascii():
            pieces = zip([0, *characters], characters, strict=False)
            within = np.cumsum([len(text[start:end].encode()) for start, end in pieces])
        return self.text_starts[number] + within


class ConversationEncoder(FastTokenizer):
    """A tokenizer made ready to turn conversations into supervised tokens.

    A token is supervised when its characters overlap an answer. So `Ġanswer`, which begins with the space after the
    colon, is supervised, and so is a token that straddles an answer's edge, such as `::` where an answer begins with a
    colon; those are counted. A token that stands for no character at all is not supervised.

    Each text is closed by one supervised eos, `eos_token_id`. Should a vocabulary yield its eos for ordinary text all
    the same, that token is not supervised. `fingerprint` is a digest of everything that decides the tokens. UserError
    where the tokenizer has no eos, or no Rust backend.
    """

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer)
        if getattr(tokenizer, "eos_token_id", None) is None:
            raise UserError(f"the tokenizer {self.name} has no eos token: set eos_token in its tokenizer_config.json")
        self.eos_token_id = int(tokenizer.eos_token_id)
        self.fingerprint = digest(self.definition, self.prefix.tolist(), self.eos_token_id)
        self._eos_token = str(tokenizer.eos_token)

    def encode(self, conversations: Sequence[Conversation], source_rows: np.ndarray | None = None) -> Documents:
        """Tokenize conversations that have an answer each, of these source rows, int64 [conversations], or numbered.

        The documents are whole, without the prefix. Their columns are `straddling_tokens`, the supervised tokens that
        also cover characters outside an answer, and `special_texts`, whether somebody wrote out the eos token.
        """
        texts = [conversation.text for conversation in conversations]
        tokens = self.locate(texts)
        answered_until = _answered_until(conversations, tokens)
        answered = answered_until[tokens.ends] - answered_until[tokens.begins]
        supervised = (answered > 0) & (tokens.ids != self.eos_token_id)
        straddling = supervised & (answered < tokens.ends - tokens.begins)
        ends = np.cumsum(tokens.counts)
        return Documents(
            input_ids=np.insert(tokens.ids, ends, self.eos_token_id),
            targets=np.insert(supervised, ends, True),
            starts=starts_of(tokens.counts + 1),
            source_rows=np.arange(len(texts)) if source_rows is None else source_rows,
            columns={
                "straddling_tokens": sums_of(straddling, starts_of(tokens.counts)),
                "special_texts": np.array([self._eos_token in text for text in texts], bool),
            },
        )

    def locate(self, texts: Sequence[str]) -> LocatedTokens:
        """Tokenize texts, on all cores at once, with the offsets of their tokens."""
        return self._locate_by_bytes(texts) or self.locate_by_characters(texts)

    def locate_by_characters(self, texts: Sequence[str]) -> LocatedTokens:
        """The tokenizer's own offsets; correct for any vocabulary."""
        encodings = self.backend.encode_batch(list(texts), add_special_tokens=False)
        ids, counts = _flat([encoding.ids for encoding in encodings])
        pairs = chain.from_iterable(encoding.offsets for encoding in encodings)
        offsets = np.fromiter(chain.from_iterable(pairs), np.int64, 2 * len(ids)).reshape(-1, 2)
        text_starts = np.cumsum([0, *map(len, texts)])
        offsets += np.repeat(text_starts[:-1], counts)[:, None]
        return LocatedTokens(ids, counts, offsets[:, 0], offsets[:, 1], text_starts, in_bytes=False)

    def _locate_by_bytes(self, texts: Sequence[str]) -> LocatedTokens | None:
        """Offsets from the tokens' byte counts, or None where those do not add up to every text's own."""
        if self._bytes_of_token is None:
            return None
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        ids, counts = _flat([encoding.ids for encoding in encodings])
        sizes = self._bytes_of_token[ids]
        until = starts_of(sizes)
        text_starts = np.cumsum([0, *(len(text) if text.isascii() else len(text.encode()) for text in texts)])
        if not np.array_equal(until[starts_of(counts)], text_starts):
            return None
        return LocatedTokens(ids, counts, until[:-1], until[1:], text_starts, in_bytes=True)

    @cached_property
    def _bytes_of_token(self) -> np.ndarray | None:
        """Bytes of text that each token stands for, int64 [vocabulary], or None where they cannot be known."""
        backend = self.backend  # only where something is tokenized: prepared data need the fingerprint alone
        if backend.normalizer is not None or not _cuts_bytes(backend):
            return None
        alphabet = set(ByteLevel.alphabet())
        sizes = np.zeros(backend.get_vocab_size(with_added_tokens=True), np.int64)
        added = backend.get_added_tokens_decoder()
        for token, number in backend.get_vocab(with_added_tokens=True).items():
            if number >= len(sizes):
                return None
            if number in added:
                sizes[number] = len(token.encode())
            elif alphabet.issuperset(token):
                sizes[number] = len(token)  # each character of this alphabet stands for one byte
            else:
                return None
        return sizes


def _flat(ids_of_texts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    counts = np.fromiter(map(len, ids_of_texts), np.int64, len(ids_of_texts))
    return np.fromiter(chain.from_iterable(ids_of_texts), np.int32, int(counts.sum())), counts


def _cuts_bytes(backend: Tokenizer) -> bool:
    whole: dict[str, Any] = json.loads(backend.pre_tokenizer.__getstate__()) if backend.pre_tokenizer else {}
    steps: list[dict[str, Any]] = whole.get("pretokenizers", [whole])
    return steps[-1].get("type") == "ByteLevel" and not any(step.get("add_prefix_space") for step in steps)


def _answered_until(conversations: Sequence[Conversation], tokens: LocatedTokens) -> np.ndarray:
    """How much of the joined texts before each place belongs to answers: int64 [bytes or characters + 1]."""
    edges = np.zeros(int(tokens.text_starts[-1]) + 1, np.int8)
    for number, conversation in enumerate(conversations):
        # Answers never touch, because a header stands between them: no place is an edge twice.
        places = tokens.positions(number, conversation.text, list(chain.from_iterable(conversation.answers)))
        edges[places[::2]] += 1
        edges[places[1::2]] -= 1
    return starts_of(np.cumsum(edges[:-1], dtype=np.int8))


def fit(
    whole: Documents, prefix: np.ndarray, max_seq_length: int, overlong: Overlong
) -> tuple[Documents, dict[str, int]]:
    """Bring tokenized conversations to at most `max_seq_length` tokens each, prefix included.

        max_seq_length 4, prefix b:   b 1 2 3 | b 4 5 6 | b 7        split, every piece behind a prefix of its own
                                      b 1 2 3                        truncate: the eos is cut with the rest

    A document's first token is predicted from nothing and so never supervised: without a prefix each piece of a split
    conversation loses at most that one. Documents without any supervised token are dropped.

    `whole` is conversations without `prefix`, int32 [tokens that the tokenizer prepends]. Returned with the documents
    are conversations by what became of them: `truncated` and `split` are kept, `too_long` are dropped for their length,
    `answer_cut` because no supervised token was left; `pieces_dropped` are pieces without a supervised token, of
    conversations of which other pieces are kept.
    """
    room = max_seq_length - len(prefix)
    assert room >= 1 and max_seq_length >= 2, "no room for a token and its target"
    lengths = whole.lengths
    too_long = lengths > room
    position = np.arange(len(whole.input_ids)) - np.repeat(whole.starts[:-1], lengths)
    if overlong == "split":
        kept_tokens = np.ones(len(position), bool)
    elif overlong == "truncate":
        kept_tokens = position < room
    else:
        kept_tokens = np.repeat(~too_long, lengths)
    first_of_piece = (position % room == 0)[kept_tokens]
    piece_lengths = np.diff(np.append(np.flatnonzero(first_of_piece), len(first_of_piece)))
    conversation = np.repeat(np.arange(len(lengths)), lengths)[kept_tokens][first_of_piece]

    no_suffix = np.zeros(0, np.int32)
    input_ids, starts, places = add_special_tokens(whole.input_ids[kept_tokens], piece_lengths, prefix, no_suffix)
    supervised = np.zeros(len(input_ids), bool)
    supervised[places] = whole.supervised[kept_tokens]
    supervised[starts[:-1]] = False
    documents = Documents(input_ids, supervised, starts, whole.source_rows[conversation])
    useful = documents.supervised_counts > 0
    survives = np.zeros(len(lengths), bool)
    survives[conversation[useful]] = True
    shortened = int((too_long & survives).sum())
    dropped_whole = too_long if overlong == "drop" else np.zeros(len(lengths), bool)
    counts = {
        "truncated": shortened if overlong == "truncate" else 0,
        "split": shortened if overlong == "split" else 0,
        "too_long": int(dropped_whole.sum()),
        "answer_cut": int((~survives & ~dropped_whole).sum()),
        "pieces_dropped": int(survives[conversation[~useful]].sum()),
    }
    return documents.select(useful), counts
