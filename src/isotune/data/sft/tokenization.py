"""From conversations to tokens with their mask, by the character offsets of the answers, and to documents that fit.

No template token is ever searched for: `### Assistant:` becomes other tokens after a space than after a line end.

A byte-level vocabulary (GPT-2, OPT, Llama 3, Qwen) splits the UTF-8 bytes of a text into tokens without changing any,
so the running total of the tokens' byte counts gives their offsets. That halves the cost: character offsets from the
tokenizer take as long again as tokenization. For any other vocabulary the tokenizer's own offsets are used.
"""

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from isotune.config.recipes import Overlong, TrainOn
from isotune.data.documents import Documents, digest, starts_of, sums_of
from isotune.data.sft.chat_format import AUTO, GUANACO, ChatFormat
from isotune.data.sft.chat_template import ChatTemplate
from isotune.data.sft.conversations import (
    REASONING_CLOSES,
    REASONING_OPENS,
    Conversation,
    first_turn,
    render_example,
    render_prompt,
)
from isotune.data.sft.messages import Example, Message
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
    """A tokenizer made ready to turn conversations into supervised tokens, and questions into the tokens before them.

    `chat_format` is a recipe's: see `chat_format.py`. Training, evaluation, generation and chat all encode by this
    class, so a model is asked with the tokens that stood before its answers in training, whatever the tokenizer adds
    to a text of its own accord.

    A token is supervised when its characters overlap an answer. So `Ġanswer`, which begins with the space after the
    colon, is supervised, and so is a token that straddles an answer's edge, such as `::` where an answer begins with a
    colon; those are counted. A token that stands for no character at all is not supervised.

    A text in Guanaco's form stands behind `prefix`, what the tokenizer puts before a text, and is closed by one
    supervised eos, `eos_token_id`. Special tokens that somebody wrote out in it are ordinary text. Should a vocabulary
    yield its eos for ordinary text all the same, that token is not supervised. A text that a chat template wrote stands
    as it is, as `apply_chat_template` tokenizes it: `prefix` is empty, and special tokens are those of the template.

    `fingerprint` is a digest of everything that decides the tokens. UserError where the tokenizer has no Rust backend,
    or in Guanaco's form no eos.
    """

    def __init__(self, tokenizer: Any, chat_format: str = AUTO) -> None:
        super().__init__(tokenizer)
        self.format = ChatFormat.of(chat_format, tokenizer)
        self._tokenizer_prefix = self.prefix
        self.template: ChatTemplate | None = None
        self.vocabulary = self.backend.get_vocab_size(with_added_tokens=True)
        self.fields_not_read: set[str] = set()  # of the messages that `conversations` wrote, in either form
        eos = getattr(tokenizer, "eos_token_id", None)
        self.eos_token_id = None if eos is None else int(eos)
        added = self.backend.get_added_tokens_decoder().values()
        self._special_tokens = [str(token.content) for token in added if token.special and token.content]
        self._beginnings = {token[:2] for token in self._special_tokens}
        if self.format.kind == GUANACO:
            if eos is None:
                raise UserError(
                    f"the tokenizer {self.name} has no eos token: set eos_token in its tokenizer_config.json"
                )
            self.fingerprint = digest(self.definition, self.prefix.tolist(), self.eos_token_id)
            return
        self.prefix = np.zeros(0, np.int32)
        carrier = copy.copy(tokenizer)
        self.format.apply(carrier)
        self.template = ChatTemplate(carrier, self._boundaries)
        self._of_template = copy.deepcopy(self.backend)
        self._of_template.encode_special_tokens = False
        # those that are found whatever stands beside them
        added = self._of_template.get_added_tokens_decoder().values()
        plain = [token for token in added if token.special and not (token.lstrip or token.rstrip or token.single_word)]
        self._special_texts = [str(token.content) for token in plain if not token.normalized]
        special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
        self.fingerprint = digest(self.definition, self.format.template, special, self._tokenizer_prefix.tolist())

    @property
    def end_ids(self) -> set[int]:
        """The token that ends an answer in a chat template's form; none in Guanaco's, which ends by eos."""
        token = self.template.end_token if self.template is not None else None
        return set() if token is None else {int(self._of_template.token_to_id(token))}

    def conversations(self, example: Example, train_on: TrainOn = "all") -> list[Conversation]:
        """The texts of a conversation with the spans of its answers; none where nothing of it can be learnt."""
        if self.template is not None:
            found = self.template.conversations(example, train_on)
            self.fields_not_read |= self.template.unread_fields
            return found
        self.fields_not_read |= example.fields_beside("")
        conversation = render_example(example, train_on)
        return [conversation] if conversation.answers else []

    def prompt(self, messages: Sequence[Message], tools: Any = None) -> str:
        """The text that asks for an answer to some messages, as it stands before the answer in training."""
        return render_prompt(messages, tools) if self.template is None else self.template.prompt(messages, tools)

    def answered(self, messages: Sequence[Message], answer: str, tools: Any = None) -> str:
        """The text of `prompt` and of an answer to it, without what ends the answer."""
        if self.template is None:  # the space belongs to the answer, as in training
            return f"{render_prompt(messages, tools)} {answer}"
        return self.template.answered(messages, answer, tools)

    def answer_in(self, completion: str, prompt: str) -> str:
        """The answer in a text that a model went on with: without reasoning, and the header of another turn.

        Reasoning is opened at the end of `prompt`, as some templates do, or at the beginning of the text.
        """
        turn = first_turn(completion) if self.template is None else completion.strip()
        opened = prompt.rstrip().endswith(REASONING_OPENS) or turn.startswith(REASONING_OPENS)
        return turn.split(REASONING_CLOSES, 1)[-1].strip() if opened else turn

    def prompt_tokens(self, prompt: str) -> list[int]:
        """The tokens of what `prompt` returned, as they stand before the answer in training."""
        if self.template is not None:
            return self._of_template.encode(prompt, add_special_tokens=False).ids
        return [*self.prefix.tolist(), *self.backend.encode(prompt, add_special_tokens=False).ids]

    def located(self, text: str) -> LocatedTokens:
        """The tokens of one text in this form behind `prefix`, with their places in characters."""
        return self.locate_by_characters([text], rendered=self.template is not None)

    def encode(self, conversations: Sequence[Conversation], source_rows: np.ndarray | None = None) -> Documents:
        """Tokenize conversations that have an answer each, of these source rows, int64 [conversations], or numbered.

        The documents are whole, without the prefix. Their columns are `straddling_tokens`, the supervised tokens that
        also cover characters outside an answer; `special_texts`, whether somebody wrote out a special token; and
        `asked_otherwise`, the answers of a template whose prompt alone has other tokens than stand before them here.
        """
        rows = np.arange(len(conversations)) if source_rows is None else source_rows
        rendered = np.array([conversation.rendered for conversation in conversations], bool)
        if rendered.all() or not rendered.any():
            return self._encode(conversations, rows)
        kinds = [np.flatnonzero(rendered), np.flatnonzero(~rendered)]
        parts = [self._encode([conversations[int(number)] for number in kind], rows[kind]) for kind in kinds]
        return Documents.concat(parts).select(np.argsort(np.concatenate(kinds)))

    def _encode(self, conversations: Sequence[Conversation], source_rows: np.ndarray) -> Documents:
        texts = [conversation.text for conversation in conversations]
        rendered = bool(conversations) and conversations[0].rendered
        tokens = self.locate(texts, rendered=rendered)
        answered_until = _answered_until(conversations, tokens)
        answered = answered_until[tokens.ends] - answered_until[tokens.begins]
        supervised = answered > 0
        if not rendered and self.eos_token_id is not None:
            supervised &= tokens.ids != self.eos_token_id
        straddling = supervised & (answered < tokens.ends - tokens.begins)
        input_ids, targets, lengths = tokens.ids, supervised, tokens.counts
        if not rendered and self.eos_token_id is not None:
            ends = np.cumsum(lengths)
            input_ids, targets = np.insert(input_ids, ends, self.eos_token_id), np.insert(targets, ends, True)
            lengths = lengths + 1
        if not rendered and self.template is not None:  # a plain text beside a template's: with its own prefix
            before = np.repeat(starts_of(lengths)[:-1], len(self._tokenizer_prefix))
            repeated = np.tile(self._tokenizer_prefix, len(lengths))
            input_ids, targets = np.insert(input_ids, before, repeated), np.insert(targets, before, False)
            lengths = lengths + len(self._tokenizer_prefix)
        no_prompts = np.zeros(len(texts), np.int64)
        written_out = [
            self._writes_special(conversation.text) if conversation.special_text is None else conversation.special_text
            for conversation in conversations
        ]
        return Documents(
            input_ids=input_ids,
            targets=targets,
            starts=starts_of(lengths),
            source_rows=source_rows,
            columns={
                "straddling_tokens": sums_of(straddling, starts_of(tokens.counts)),
                "special_texts": np.array(written_out, bool),
                "asked_otherwise": self._asked_otherwise(conversations, tokens) if rendered else no_prompts,
            },
        )

    def _writes_special(self, text: str) -> bool:
        """Whether a text has a special token written out, of which models may have hundreds."""
        return any(start in text for start in self._beginnings) and any(token in text for token in self._special_tokens)

    def _asked_otherwise(self, conversations: Sequence[Conversation], tokens: LocatedTokens) -> np.ndarray:
        """Answers of each conversation whose prompt has other tokens than stand before the answer, int64.

        The end of a prompt and the beginning of an answer may share a token, or be cut otherwise side by side.
        """
        prompts: list[tuple[int, int]] = []  # the conversation, and its token at which the compared text begins
        texts: list[str] = []
        starts = starts_of(tokens.counts)
        for number, one in enumerate(conversations):
            # a special token is cut out before anything else is, so nothing before the last one matters
            own = tokens.begins[starts[number] : starts[number + 1]]
            for end in one.prompts:
                begin = self._last_special(one.text, end)
                place = int(tokens.positions(number, one.text, [begin])[0])
                first = int(np.searchsorted(own, place))
                if first == len(own) or own[first] != place:  # within another token
                    begin = first = 0
                prompts.append((number, int(starts[number]) + first))
                texts.append(one.text[begin:end])
        alone = self._of_template.encode_batch_fast(texts, add_special_tokens=False)
        found = np.zeros(len(conversations), np.int64)
        for (number, first), encoding in zip(prompts, alone, strict=True):
            found[number] += tokens.ids[first : first + len(encoding.ids)].tolist() != encoding.ids
        return found

    def _last_special(self, text: str, end: int) -> int:
        """Where the last special token before `end` begins in a text that the template wrote; 0 without one."""
        return max(0, *(text.rfind(token, 0, end) for token in self._special_texts)) if self._special_texts else 0

    def _boundaries(self, text: str) -> list[int]:
        """Where the tokens of a text that the template wrote begin and end, in characters."""
        offsets = self._of_template.encode(text, add_special_tokens=False).offsets
        return sorted({place for pair in offsets for place in pair})

    def locate(self, texts: Sequence[str], *, rendered: bool = False) -> LocatedTokens:
        """Tokenize texts, on all cores at once, with the offsets of their tokens; `rendered`: a template wrote them."""
        return self._locate_by_bytes(texts, rendered) or self.locate_by_characters(texts, rendered=rendered)

    def locate_by_characters(self, texts: Sequence[str], *, rendered: bool = False) -> LocatedTokens:
        """The tokenizer's own offsets; correct for any vocabulary."""
        backend = self._of_template if rendered else self.backend
        encodings = backend.encode_batch(list(texts), add_special_tokens=False)
        ids, counts = _flat([encoding.ids for encoding in encodings])
        pairs = chain.from_iterable(encoding.offsets for encoding in encodings)
        offsets = np.fromiter(chain.from_iterable(pairs), np.int64, 2 * len(ids)).reshape(-1, 2)
        text_starts = np.cumsum([0, *map(len, texts)])
        offsets += np.repeat(text_starts[:-1], counts)[:, None]
        return LocatedTokens(ids, counts, offsets[:, 0], offsets[:, 1], text_starts, in_bytes=False)

    def _locate_by_bytes(self, texts: Sequence[str], rendered: bool) -> LocatedTokens | None:
        """Offsets from the tokens' byte counts, or None where those do not add up to every text's own."""
        if self._bytes_of_token is None:
            return None
        backend = self._of_template if rendered else self.backend
        encodings = backend.encode_batch_fast(list(texts), add_special_tokens=False)
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
        # Where two answers touch, a place is an end and a start: once down and once up.
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
    are source rows by what became of them: `truncated` and `split` are kept, `too_long` are dropped for their length,
    `answer_cut` because no supervised token was left; `pieces_dropped` are pieces without a supervised token, of rows
    of which other pieces are kept.
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
    row_of = np.unique(whole.source_rows, return_inverse=True)[1]  # of each document, counted among these rows
    rows = int(row_of.max(initial=-1)) + 1
    survives, is_long = np.zeros(rows, bool), np.zeros(rows, bool)
    survives[row_of[conversation[useful]]] = True
    is_long[row_of[too_long]] = True
    shortened = int((is_long & survives).sum())
    dropped_whole = is_long & ~survives if overlong == "drop" else np.zeros(rows, bool)
    counts = {
        "truncated": shortened if overlong == "truncate" else 0,
        "split": shortened if overlong == "split" else 0,
        "too_long": int(dropped_whole.sum()),
        "answer_cut": int((~survives & ~dropped_whole).sum()),
        "pieces_dropped": int(survives[row_of[conversation[~useful]]].sum())
        + (int((too_long & survives[row_of]).sum()) if overlong == "drop" else 0),
    }
    return documents.select(useful), counts
