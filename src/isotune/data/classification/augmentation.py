"""Training texts that are other ones in each epoch: words left out, in another order, or in the place of synonyms.

What happens to a text follows from the seed, the epoch and what the text says, never from where it stands, so that a
run is the same on any number of processes, after a resume and with other rows beside it. All epochs are prepared
before the first step: the batch schedule knows every length in advance, as that of a run without augmentation does.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, cast

import numpy as np
from tqdm import tqdm

from isotune.config import ClassificationRecipe
from isotune.data.cache import Content, load_or_build
from isotune.data.contents import AUGMENTED, clean, uniform_stream
from isotune.data.documents import CountsTable, Documents, PreparedData, digest, with_share
from isotune.data.packing import one_document_per_row
from isotune.data.pieces import DocumentFiles, in_threads
from isotune.data.tokenizer import TextEncoder
from isotune.io.errors import UserError
from isotune.io.reading import Unreadable, parse_json, read_text

AUGMENTED_FORMAT_VERSION = 1  # raised when the same text becomes another one
TEXTS_AT_ONCE = 1_000
DRAWS = 4  # for each word: whether a synonym takes its place, and which; whether it changes places, or is left out
SHOWN_CHARACTERS = 400  # of an example; a longer text is none

_WORD = re.compile(r"(\S+)(\s*)")
_LETTER = re.compile(r"\w")

Synonyms = Mapping[str, tuple[str, ...]]  # by the word, without case


@dataclass
class Counts:
    """What was done to texts."""

    texts: int = 0
    changed: int = 0  # texts that are not what they were
    words: int = 0
    replaced: int = 0  # words, by a synonym
    swapped: int = 0  # pairs of neighbouring words
    dropped: int = 0  # words

    def add(self, other: "Counts") -> None:
        """Count what was done to further texts too."""
        for name, number in asdict(other).items():
            setattr(self, name, getattr(self, name) + number)


@dataclass(frozen=True)
class Augmentation:
    """How texts are augmented: shares from 0 to 1 of their words, which white space separates."""

    seed: int
    word_dropout: float = 0.0
    word_swap: float = 0.0
    synonym_rate: float = 0.0
    synonyms: Synonyms = field(default_factory=dict[str, tuple[str, ...]])

    @classmethod
    def of(cls, recipe: ClassificationRecipe) -> "Augmentation | None":
        """That of a recipe; None where it asks for none. UserError for a table that cannot be read."""
        file = recipe.augment_synonyms
        synonyms: Synonyms = {} if file is None else read_synonyms(file)
        rate = recipe.augment_synonym_rate if synonyms else 0.0
        if not (recipe.augment_word_dropout or recipe.augment_word_swap or rate):
            return None
        return cls(recipe.seed, recipe.augment_word_dropout, recipe.augment_word_swap, rate, synonyms)

    def facts(self) -> list[Any]:
        """All that decides what becomes of a text, for fingerprints."""
        rates = [self.word_dropout, self.word_swap, self.synonym_rate]
        return [AUGMENTED_FORMAT_VERSION, self.seed, *rates, sorted(self.synonyms.items())]

    def augment(self, text: str, content: int, epoch: int, counts: Counts) -> str:
        """What `text`, which says `content` (isotune.data.contents), is in this epoch; `counts` counts what was done.

        Synonyms first, then places, then words left out; a text keeps one word at least. The white space between words
        stays, but for what follows a word that is left out.
        """
        found = _WORD.findall(text)
        words, gaps = [word for word, _ in found], [gap for _, gap in found]
        draws = uniform_stream(AUGMENTED, self.seed, epoch, content, DRAWS * len(words)).reshape(-1, DRAWS).T
        counts.texts += 1
        counts.words += len(words)
        if not words:
            return text
        for place in np.flatnonzero(draws[0] < self.synonym_rate).tolist():
            synonym = self._synonym(words[place], float(draws[1, place]))
            if synonym is not None:
                words[place] = synonym
                counts.replaced += 1
        free = 0  # the first word that has not changed places
        for place in np.flatnonzero(draws[2, :-1] < self.word_swap).tolist():
            if place >= free:
                words[place], words[place + 1] = words[place + 1], words[place]
                free = place + 2
                counts.swapped += 1
        kept = draws[3] >= self.word_dropout
        kept[draws[3].argmax()] = True
        counts.dropped += len(words) - int(kept.sum())
        lead = text[: len(text) - sum(map(len, chain.from_iterable(found)))]
        made = lead + "".join(words[place] + gaps[place] for place in np.flatnonzero(kept).tolist())
        counts.changed += made != text
        return made

    def _synonym(self, word: str, draw: float) -> str | None:
        """A synonym in the place of a word, with its marks and its capital; None where the table has none."""
        first, last = _LETTER.search(word), _LETTER.search(word[::-1])
        if first is None or last is None:
            return None
        begin, end = first.start(), len(word) - last.start()
        core = word[begin:end]
        others = self.synonyms.get(core.casefold(), ())
        if not others:
            return None
        chosen = others[int(draw * len(others))]
        return word[:begin] + (chosen[:1].upper() + chosen[1:] if core[:1].isupper() else chosen) + word[end:]


def read_synonyms(file: str) -> Synonyms:
    """A table of synonyms: lines of a word and its synonyms between tabs, or a JSON object of a list for each word.

    A word that stands in several lines has the synonyms of all. UserError names the line or the word of a mistake.
    """
    path, table = Path(file), dict[str, dict[str, None]]()
    key = f"augment_synonyms {file}"
    try:
        text = read_text(path).removeprefix("\ufeff")
        entries = _of_json(text) if path.suffix.lower() == ".json" else _of_lines(text)
        for word, synonyms in entries:
            table.setdefault(word.casefold(), {}).update(dict.fromkeys(synonyms))
    except FileNotFoundError:
        raise UserError(f"{key}: there is no such file") from None
    except Unreadable as reason:
        raise UserError(reason.of(key)) from None
    if not table:
        raise UserError(f"{key} holds no word")
    return {word: tuple(synonyms) for word, synonyms in table.items()}


def _of_lines(text: str) -> Iterator[tuple[str, Sequence[str]]]:
    for number, line in enumerate(text.splitlines(), start=1):
        cells = [cell.strip() for cell in line.split("\t")]
        if not any(cells):
            continue
        if len(cells) < 2 or not all(cells) or len(cells[0].split()) != 1:
            raise Unreadable("it has not a word and its synonyms between tabs", number)
        yield cells[0], cells[1:]


def _of_json(text: str) -> Iterator[tuple[str, Sequence[str]]]:
    value = parse_json(text)
    if not isinstance(value, dict):
        raise Unreadable("it has no keys: a table is an object of words, each with a list of synonyms")
    for word, synonyms in cast("dict[str, Any]", value).items():
        own: list[Any] = cast("list[Any]", synonyms) if isinstance(synonyms, list) else [synonyms]
        if len(word.split()) != 1 or not own or not all(isinstance(each, str) and each.strip() for each in own):
            raise Unreadable(f"it has not a word and its synonyms, a list of texts, at {word!r}")
        yield word.strip(), [str(each).strip() for each in own]


def epochs_of(recipe: ClassificationRecipe, documents: int) -> int:
    """The epochs that a run over so many documents begins."""
    if recipe.max_steps > 0:
        return math.ceil(recipe.max_steps / math.ceil(documents / recipe.global_batch_size))
    return math.ceil(recipe.num_train_epochs)


def augmented(
    train: PreparedData,
    contents: np.ndarray,
    augmentation: Augmentation | None,
    recipe: ClassificationRecipe,
    tokenizer: Any,
    *,
    show_progress: bool,
) -> PreparedData:
    """The training documents as each epoch of the run sees them; as they are where nothing is augmented.

    `contents` are what the texts say, uint64 [documents]. The documents of an epoch have the order, targets, ids and
    source rows of `train`; the table counts what was done over all epochs.
    """
    if augmentation is None:
        return train
    encoder = TextEncoder(tokenizer)
    epochs = epochs_of(recipe, len(train.documents))
    fingerprint = digest(train.fingerprint, "augmented", epochs, *augmentation.facts())

    def texts() -> Iterator[tuple[int, slice, list[str]]]:
        for epoch in range(epochs):
            remaining, first = train.texts(), 0
            while some := list(islice(remaining, TEXTS_AT_ONCE)):
                yield epoch, slice(first, first + len(some)), some
                first += len(some)

    def make(batch: tuple[int, slice, list[str]]) -> tuple[Documents, Counts, dict[str, str] | None]:
        epoch, place, originals = batch
        counts, made = Counts(), list[str]()
        originals = [clean(text) for text in originals] if recipe.clean_text else originals
        for text, content in zip(originals, contents[place].tolist(), strict=True):
            made.append(augmentation.augment(text, content, epoch, counts))
        encoded = encoder.encode(made, recipe.max_seq_length, recipe.overlong, train.documents.labels[place])
        documents = replace(
            encoded,
            source_rows=np.asarray(train.documents.source_rows[place]),
            columns={"ids": np.asarray(train.documents.ids[place])},
        )
        return documents, counts, _example(originals, made)

    def build(folder: Path) -> Content:
        files, counts, example = DocumentFiles(folder), Counts(), None
        total = epochs * len(train.documents)
        with closing(files), tqdm(desc="augmenting", total=total, unit=" texts", disable=not show_progress) as bar:
            for _, (documents, own, shown) in in_threads(texts(), make):
                files.add(documents)
                counts.add(own)
                example = example or shown
                bar.update(len(documents))
            return files.documents().as_arrays(), {"epochs": epochs, **asdict(counts), "example": example}

    arrays, done = load_or_build(fingerprint, build)
    documents = Documents.from_arrays(arrays)
    rows, table = one_document_per_row(len(documents), epochs), _with_counts(train.table, done)
    return replace(train, documents=documents, rows=rows, table=table, fingerprint=fingerprint)


def _example(originals: Sequence[str], made: Sequence[str]) -> dict[str, str] | None:
    """The first short text that was changed, before and after."""
    pairs = zip(originals, made, strict=True)
    return next(
        ({"text": text, "augmented": new} for text, new in pairs if text != new and len(text) <= SHOWN_CHARACTERS), None
    )


def _with_counts(table: CountsTable, counts: Mapping[str, Any]) -> CountsTable:
    words, epochs = counts["words"], counts["epochs"]
    lines = [
        ("augmented", f"{epochs:,} epoch{'s' if epochs > 1 else ''}, each with texts of its own"),
        ("  texts changed", with_share(counts["changed"], counts["texts"])),
        ("  words replaced by a synonym", with_share(counts["replaced"], words)),
        ("  neighbouring words swapped, pairs", f"{counts['swapped']:,}"),
        ("  words left out", with_share(counts["dropped"], words)),
    ]
    return CountsTable(table.source, {**table.counts, "augmented": dict(counts)}, (*table.lines, *lines))
