"""The whole way from a named data set to documents in rows, gone once per content and then read from disk."""

import hashlib
import json
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, get_args

import numpy as np
from tqdm import tqdm

from isotune.data.cache import Content, load_or_build
from isotune.data.documents import Documents, Rows
from isotune.data.packing import each_alone, pack
from isotune.data.sft.conversations import TrainOn
from isotune.data.sft.table import DocumentCounts, PreparationTable, length_quantiles
from isotune.data.sft.tokenization import ConversationEncoder, Encoded
from isotune.data.sft.truncation import FitCounts, Overlong, fit
from isotune.data.sources.batches import TEXT_FIELD, Batch, read_batches
from isotune.data.sources.source import Source, read_rows
from isotune.io.errors import UserError

FORMAT_VERSION = 1  # raised when the same input gives other documents
ENCODING_THREADS = 2

NO_ANSWER = "no assistant answer"
ANSWER_CUT = "no answer within max_seq_length"
TOO_LONG = "longer than max_seq_length"


@dataclass(frozen=True)
class PreparationSettings:
    """What a recipe says about its data.

    Attributes:
        max_seq_length: tokens a row holds, and a document at most.
        packing: put several documents into a row; else each document is its own row.
        overlong: what happens to longer conversations.
        train_on: supervise every answer of a conversation, or its last.
        dataset_text_field: the column that holds the conversation; `messages` and `conversations` are found without.
        seed: decides which of the documents of one length share a row.
    """

    max_seq_length: int = 1024
    packing: bool = True
    overlong: Overlong = "truncate"
    train_on: TrainOn = "all"
    dataset_text_field: str = TEXT_FIELD
    seed: int = 0

    def check(self, prefix_tokens: int) -> None:
        """Raise UserError for a value that no data could be prepared with."""
        if self.max_seq_length < prefix_tokens + 2:
            raise UserError(
                f"max_seq_length is {self.max_seq_length}: a document needs at least {prefix_tokens + 2} tokens"
            )
        for key, choices in (("overlong", get_args(Overlong)), ("train_on", get_args(TrainOn))):
            if getattr(self, key) not in choices:
                raise UserError(f"{key} is {getattr(self, key)!r}; it may be {', '.join(choices)}")


@dataclass(frozen=True)
class PreparedData:
    """Documents, the rows that they were put in, the counts to print, and a digest of all that decided them."""

    documents: Documents
    rows: Rows
    table: PreparationTable
    fingerprint: str


def prepare(
    dataset_name: str,
    split: str,
    tokenizer: Any,
    settings: PreparationSettings,
    *,
    name: str = "dataset_name",
    show_progress: bool = True,
) -> PreparedData:
    """Read, tokenise, mask and pack one split of a data set of conversations.

    The documents are kept on disk (isotune.data.cache) under a digest of the source's content, the tokenizer and the
    settings that matter to them; packing is quick and done each time, so another seed tokenises nothing.

    Args:
        dataset_name, split, name: as in `isotune.data.sources.source.read_rows`.
        tokenizer: of transformers, with a Rust backend, an eos and a pad token.
        show_progress: a bar of documents on stderr; one process of a launch should say True.

    Raises:
        UserError: whatever the user can put right, in one sentence; nothing is written then.
    """
    encoder = ConversationEncoder(tokenizer)
    settings.check(len(encoder.prefix))
    source = read_rows(dataset_name, split, name=name)
    documents_digest = digest(
        FORMAT_VERSION,
        source.fingerprint,
        encoder.fingerprint,
        settings.max_seq_length,
        settings.overlong,
        settings.train_on,
        settings.dataset_text_field,
    )
    documents, counts = load_or_build(
        documents_digest, lambda: _build(source, encoder, settings, show_progress=show_progress)
    )
    if settings.packing:
        rows = pack(documents.lengths, settings.max_seq_length, settings.seed)
    else:
        rows = each_alone(len(documents))
    table = PreparationTable(
        # Equal content may have been prepared under another name before.
        DocumentCounts(**{**counts, "source": source.name}),
        rows=len(rows),
        row_capacity=settings.max_seq_length,
        packing=settings.packing,
    )
    fingerprint = digest(documents_digest, settings.packing, settings.seed if settings.packing else None)
    return PreparedData(documents, rows, table, fingerprint)


def _build(
    source: Source, encoder: ConversationEncoder, settings: PreparationSettings, *, show_progress: bool
) -> Content[Documents]:
    """Tokenise a whole source and count what became of it."""
    parts: list[Documents] = []
    whole_lengths: list[np.ndarray] = []
    tally: Counter[str] = Counter()
    with tqdm(desc="preparing", unit=" documents", disable=not show_progress) as bar:
        for batch, encoded in _encoded_ahead(
            encoder, read_batches(source, settings.dataset_text_field, settings.train_on)
        ):
            fitted, fit_counts = fit(encoded, batch.rows, encoder.prefix, settings.max_seq_length, settings.overlong)
            tally.update({"read": batch.read, "turns_cut": batch.turns_cut})
            tally.update(_tally(encoded, fit_counts))
            parts.append(fitted)
            whole_lengths.append(np.diff(encoded.starts) + len(encoder.prefix))
            bar.update(batch.read)
    documents = _join(parts)
    answered = sum(map(len, whole_lengths))
    dropped = {
        NO_ANSWER: tally["read"] - answered,
        ANSWER_CUT: tally["answer_cut"],
        TOO_LONG: tally["too_long"],
    }
    if not len(documents):
        reasons = ", ".join(f"{number} {reason}" for reason, number in dropped.items() if number)
        raise UserError(f"none of the {tally['read']} rows of {source.name} can be trained on: {reasons}")
    counts = DocumentCounts(
        source=source.name,
        read=tally["read"],
        kept=len(np.unique(documents.source_rows)),
        truncated=tally["truncated"],
        split=tally["split"],
        dropped=dropped,
        documents=len(documents),
        pieces_dropped=tally["pieces_dropped"],
        turns_cut=tally["turns_cut"],
        tokens=len(documents.input_ids),
        supervised_tokens=int(documents.supervised.sum()),
        straddling_tokens=tally["straddling_tokens"],
        special_texts=tally["special_texts"],
        whole_lengths=length_quantiles(np.concatenate(whole_lengths)),
    )
    return documents, asdict(counts)


def _tally(encoded: Encoded, fitted: FitCounts) -> dict[str, int]:
    return {
        "truncated": fitted.truncated,
        "split": fitted.split,
        "too_long": fitted.dropped_too_long,
        "answer_cut": fitted.dropped_answer_cut,
        "pieces_dropped": fitted.pieces_dropped,
        "straddling_tokens": encoded.straddling_tokens,
        "special_texts": encoded.special_texts,
    }


def _encoded_ahead(encoder: ConversationEncoder, batches: Iterator[Batch]) -> Iterator[tuple[Batch, Encoded]]:
    """Tokenise batches in order, in threads: while Rust works on one, Python reads and lays out its neighbours."""
    with ThreadPoolExecutor(ENCODING_THREADS) as threads:
        under_way: deque[tuple[Batch, Future[Encoded]]] = deque()
        for batch in batches:
            under_way.append((batch, threads.submit(encoder.encode, batch.conversations)))
            if len(under_way) > ENCODING_THREADS:
                oldest, future = under_way.popleft()
                yield oldest, future.result()
        for oldest, future in under_way:
            yield oldest, future.result()


def _join(parts: list[Documents]) -> Documents:
    lengths = np.concatenate([part.lengths for part in parts])
    return Documents(
        input_ids=np.concatenate([part.input_ids for part in parts]),
        supervised=np.concatenate([part.supervised for part in parts]),
        starts=np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
        source_rows=np.concatenate([part.source_rows for part in parts]),
    )


def digest(*parts: Any) -> str:
    """Hexadecimal digest of parts that JSON can say."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
