"""From a named data set of conversations to documents in rows: tokenized once per content, then read from disk."""

from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from tqdm import tqdm

from isotune.config.recipes import Overlong, Recipe, TrainOn
from isotune.data.cache import Content, load_or_build
from isotune.data.documents import (
    CountsTable,
    DataSettings,
    Documents,
    PreparedData,
    RunData,
    check_left_out,
    count_lines,
    digest,
    note_lines,
    starts_of,
)
from isotune.data.mixture import count_parts, evaluation_source, mixture_lines, name_parts, training_source
from isotune.data.packing import one_document_per_row, pack
from isotune.data.pieces import DocumentFiles, in_threads
from isotune.data.sft.chat_format import AUTO
from isotune.data.sft.forms import TEXT_FIELD, NamedColumns
from isotune.data.sft.reading import Batch, read_batches
from isotune.data.sft.tokenization import ConversationEncoder, fit
from isotune.data.sources.source import Source, read_rows
from isotune.io.errors import UserError

FORMAT_VERSION = 1  # raised when the same input gives other documents
# raised when an entry of the cache holds more than it did, or rows are read that were refused, or of which a part was
# lost: under FORMAT_VERSION no run of any other rows could go on
CACHE_VERSION = 8
OF_CONVERSATIONS = ("turns_cut", "marked", "unasked")  # what is counted of each

NO_ANSWER = "no assistant answer"
ANSWER_CUT = "no answer within max_seq_length"
TOO_LONG = "longer than max_seq_length"


@dataclass(frozen=True)
class SftSettings(DataSettings):
    """What a recipe says about its conversations; `messages` and `conversations` are found without a text field."""

    MIN_OWN_TOKENS: ClassVar[int] = 2  # one to predict from, one to predict

    max_seq_length: int = 1024  # of a row too
    overlong: Overlong = "truncate"
    dataset_text_field: str = TEXT_FIELD
    dataset_prompt_field: str | None = None
    dataset_completion_field: str | None = None
    seed: int = 0  # decides which of the documents of one length share a row
    packing: bool = True  # else each document is its own row
    allow_dropped: bool = False  # go on where most rows are left out
    train_on: TrainOn = "all"
    chat_format: str = AUTO

    @property
    def columns(self) -> NamedColumns:
        """The columns that the recipe names."""
        return NamedColumns(self.dataset_text_field, self.dataset_prompt_field, self.dataset_completion_field)


def prepare_conversations(recipe: Recipe, tokenizer: Any, *, show: bool) -> RunData:
    """Read, mask and pack the conversations that a recipe names.

    `show` asks for progress on stderr and a table of each set on stdout; one process of a launch should.
    """
    settings = SftSettings.of(recipe)
    if show:
        print(f"chat        {ConversationEncoder(tokenizer, settings.chat_format).format}", flush=True)
    train = prepare_source(training_source(recipe), tokenizer, settings, show_progress=show)
    evaluation = None
    if recipe.eval_dataset_name:
        evaluation = prepare_source(evaluation_source(recipe), tokenizer, settings, show_progress=show)
    return RunData(train, evaluation).shown(show)


def prepare(
    dataset_name: str,
    split: str,
    tokenizer: Any,
    settings: SftSettings,
    *,
    name: str = "dataset_name",
    columns: Sequence[str] | None = None,
    config: str | None = None,
    revision: str | None = None,
    show_progress: bool = True,
) -> PreparedData:
    """`prepare_source` of what `isotune.data.sources.source.read_rows` finds under these names."""
    source = read_rows(dataset_name, split, name=name, columns=columns, config=config, revision=revision)
    return prepare_source(source, tokenizer, settings, show_progress=show_progress)


def prepare_source(source: Source, tokenizer: Any, settings: SftSettings, *, show_progress: bool) -> PreparedData:
    """Read, tokenize, mask and pack the conversations of a source.

    The documents are kept on disk (isotune.data.cache) under a digest of the source's content, the tokenizer and the
    settings that matter to them; packing is quick and done each time, so another seed tokenizes nothing.
    """
    encoder = ConversationEncoder(tokenizer, settings.chat_format)
    settings.check(len(encoder.prefix))
    pair = (settings.dataset_prompt_field, settings.dataset_completion_field)
    columns = (settings.dataset_text_field, *(pair if any(pair) else ()))
    decisive = (settings.max_seq_length, settings.overlong, settings.train_on, *columns)
    documents_digest = digest(FORMAT_VERSION, source.fingerprint, encoder.fingerprint, *decisive)
    arrays, counts = load_or_build(
        digest(documents_digest, CACHE_VERSION), lambda folder: _build(source, encoder, settings, show_progress, folder)
    )
    documents = Documents.from_arrays(arrays)
    if settings.packing:
        rows = pack(documents.lengths, settings.max_seq_length, settings.seed)
    else:
        rows = one_document_per_row(len(documents))
    check_left_out(source.name, counts["read"], counts["dropped"], allowed=settings.allow_dropped, show=show_progress)
    del counts["source"]  # equal content may have been prepared under another name before
    counts |= name_parts(source, counts)
    table = _table(source.name, counts, len(rows), settings)
    fingerprint = digest(documents_digest, settings.packing, settings.seed if settings.packing else None)
    return PreparedData(documents, rows, table, fingerprint)


def _build(
    source: Source, encoder: ConversationEncoder, settings: SftSettings, show_progress: bool, folder: Path
) -> Content:
    """Tokenize a whole source, its tokens into files of `folder`, and count what became of it."""
    made = DocumentFiles(folder)
    whole_lengths: list[np.ndarray] = []
    tally: Counter[str] = Counter()
    seen: list[str] = []
    guesses: list[str] = []
    tokenised = rendered = False
    batches = read_batches(source, settings.columns, settings.train_on, encoder, seen=seen, guesses=guesses)
    with closing(made), tqdm(desc="preparing", unit=" documents", disable=not show_progress) as bar:
        for batch, whole in in_threads(batches, partial(_encode, encoder)):
            prefix = encoder.prefix[:0] if batch.tokenised else encoder.prefix
            fitted, counts = fit(whole, prefix, settings.max_seq_length, settings.overlong)
            tally.update(counts)
            with_something = len(np.unique(batch.rows))
            tally.update({"read": batch.read, "no_answer": batch.read - with_something})
            tally.update({"rewritten": len(batch.rows) - with_something})
            tally.update({name: sum(getattr(c, name) for c in batch.conversations) for name in OF_CONVERSATIONS})
            tally.update({name: int(values.sum()) for name, values in whole.columns.items()})
            made.add(fitted)
            whole_lengths.append(whole.lengths + len(prefix))
            bar.update(batch.read)
            tokenised = tokenised or bool(batch.tokenised)
            rendered = rendered or any(conversation.rendered for conversation in batch.conversations)
        documents = made.documents()
    form_notes = guesses[:1]  # the first says how rows are read
    if tokenised and settings.train_on != "all":
        guesses.append(
            f"rows are tokenised already, and train_on: {settings.train_on} is not in effect: their own labels or "
            "masks say what is learnt"
        )
    if rendered and encoder.template is not None and encoder.template.end_token is None:
        guesses.append(
            f"the chat template ends an answer with {encoder.template.ending!r}, which is no token: "
            "generation goes on to its limit (add_tokens makes a token of a text)"
        )
    dropped = {NO_ANSWER: tally["no_answer"], ANSWER_CUT: tally["answer_cut"], TOO_LONG: tally["too_long"]}
    if not len(documents):
        reasons = ", ".join(f"{number} {reason}" for reason, number in dropped.items() if number)
        raise UserError(
            f"none of the {tally['read']} rows of {source.name} can be trained on: {reasons}"
            + (_expected_form(seen, form_notes) if tally["no_answer"] == tally["read"] else "")
        )
    return documents.as_arrays(), {
        "source": source.name,
        "read": tally["read"],  # rows of the source: `kept` and all of `dropped`
        "kept": len(np.unique(documents.source_rows)),
        "truncated": tally["truncated"],  # kept rows that were longer than max_seq_length, as are `split`
        "split": tally["split"],
        "notes": [*guesses, *source.notes],  # what reading guessed, or passed over
        "dropped": dropped,  # rows by the reason for which they are not trained on
        "documents": len(documents),  # what is trained on; more than `kept` where rows were split
        "pieces_dropped": tally["pieces_dropped"],  # pieces of split rows that held no supervised token
        "turns_cut": tally["turns_cut"],  # after the last answer of a conversation
        "marked": tally["marked"],  # answers that the data ask not to learn
        "unasked": tally["unasked"],  # answers that open a conversation, for which the template has no prompt
        "rewritten": tally["rewritten"],  # documents beside the first of a row: the template rewrites earlier turns
        "fields_not_read": sorted(encoder.fields_not_read),  # of messages, beside those that mean something here
        "tokens": len(documents.input_ids),
        "supervised_tokens": int(documents.supervised.sum()),
        "straddling_tokens": tally["straddling_tokens"],  # that also cover a character outside their answer
        "asked_otherwise": tally["asked_otherwise"],  # answers whose prompt alone has other tokens than in training
        "special_texts": tally["special_texts"],  # in which a special token is written out, encoded as ordinary text
        "whole_lengths": CountsTable.quantiles(np.concatenate(whole_lengths)),  # tokens before anything was cut
        **count_parts(source, documents),
    }


def _expected_form(seen: list[str], notes: list[str]) -> str:
    """What to say where no text has a header, given how the first of them begins, and the notes about reading."""
    if not seen:
        return ""
    return (
        f"; {seen[0]}: give the conversations as messages with chat_format, or learn the texts as they stand, "
        "markers of turns as characters and not as special tokens, by train_on: everything"
        + "".join(f"; {note}" for note in notes)
    )


def _table(source: str, counts: dict[str, Any], rows: int, settings: SftSettings) -> CountsTable:
    """What became of the conversations of a source; `counts` are the same for every packing and seed."""
    tokens, supervised, capacity = counts["tokens"], counts["supervised_tokens"], settings.max_seq_length
    efficiency = tokens / (rows * capacity)  # the share of all rows' capacity that tokens fill
    lines = [
        ("documents read", f"{counts['read']:,}"),
        ("  kept", f"{counts['kept']:,}"),
        *count_lines(
            {
                "  truncated": counts["truncated"],
                "  split": counts["split"],
                **{f"  dropped: {reason}": number for reason, number in counts["dropped"].items()},
                "pieces after splitting": counts["documents"] if counts["split"] else 0,
                "  dropped: no supervised token": counts["pieces_dropped"],
                "turns after the last answer, left out": counts["turns_cut"],
                "answers marked not to be learnt": counts["marked"],
                "answers that the template asks for by nothing, left out": counts["unasked"],
                "answers in documents of their own": counts["rewritten"],
                "tokens across an answer's edge": counts["straddling_tokens"],
                "answers whose prompt alone has other tokens": counts["asked_otherwise"],
                "texts with a special token written out": counts["special_texts"],
            }
        ),
        *mixture_lines(counts),
        *note_lines(counts.get("notes", [])),
        *((("fields that nothing reads", ", ".join(counts["fields_not_read"])),) if counts["fields_not_read"] else ()),
        ("tokens", f"{tokens:,}"),
        ("  supervised", f"{supervised:,} ({supervised / tokens:.1%})"),
        (f"rows of {capacity:,} tokens", f"{rows:,}"),
        ("  filled" if settings.packing else "  filled (not packed)", f"{efficiency:.2%}"),
    ]
    of_rows = {"rows": rows, "row_capacity": capacity, "packing": settings.packing, "packing_efficiency": efficiency}
    return CountsTable(source, {**counts, **of_rows}, tuple(lines))


def _encode(encoder: ConversationEncoder, batch: Batch) -> Documents:
    """The documents of a batch, whole: of its conversations, or of rows that somebody has tokenised."""
    if not batch.tokenised:
        return encoder.encode(batch.conversations, batch.rows)
    none = np.zeros(len(batch.rows), np.int64)
    return Documents(
        input_ids=np.concatenate([row.input_ids for row in batch.tokenised]),
        targets=np.concatenate([row.supervised for row in batch.tokenised]),
        starts=starts_of(np.array([len(row.input_ids) for row in batch.tokenised])),
        source_rows=batch.rows,
        columns={"straddling_tokens": none, "special_texts": none.astype(bool), "asked_otherwise": none},
    )
