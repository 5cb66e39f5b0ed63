"""The rows on which an exported file is compared with the run's model: those of its own evaluation where they are."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from isotune.config import ClassificationRecipe, Recipe
from isotune.config.recipes import project_of
from isotune.data.classification.labels import ClassificationSettings
from isotune.data.classification.reading import TEXTS, encode_texts
from isotune.data.contents import clean
from isotune.data.documents import FIRST_TYPE, Documents
from isotune.data.mixture import evaluation_source, training_source
from isotune.data.sft.preparation import SftSettings
from isotune.data.sft.reading import read_batches
from isotune.data.sft.tokenization import ConversationEncoder
from isotune.data.sources.source import Source
from isotune.data.tokenizer import TextEncoder
from isotune.io.errors import UserError
from isotune.models.finished_run import FinishedRun, is_classifier, probe_tokens
from isotune.models.packed_attention import max_positions

CONVERSATIONS, CONVERSATION_TOKENS = 8, 64  # the logits of each token are as many as the vocabulary
TEXT_ROWS = 64


@dataclass(frozen=True)
class Row:
    """The tokens of a document, special ones included."""

    ids: list[int]
    first_type: int | None = None  # the first token of type 1, of a pair whose texts are told apart by token types


@dataclass(frozen=True)
class ComparedRows:
    """Rows, and in words where they are from."""

    rows: list[Row]
    source: str


def compared_rows(run: FinishedRun, tokenizer: Any, config: Any) -> ComparedRows:
    """The first rows of what a run evaluates on, or of what it was trained on where it evaluates on a share of that.

    Where they cannot be read, or are of a form of a project's own, a conversation of the program's own and tokens from
    all over the vocabulary stand in, which `source` says.
    """
    try:
        return _texts(run, tokenizer) if is_classifier(run) else _conversations(run, tokenizer, config)
    except UserError as error:  # data that have moved, or a network that is gone, are no reason against an export
        rows = [Row([int(token) for token in tokens]) for tokens in probe_tokens(run, tokenizer, config)]
        return ComparedRows(rows, f"the program's own, as the run's data cannot be read ({error})")


def _source(recipe: Recipe | ClassificationRecipe) -> Source:
    names_evaluation = recipe.eval_dataset_name is not None or recipe.eval_dataset_mixture is not None
    return evaluation_source(recipe) if names_evaluation else training_source(recipe)


def _conversations(run: FinishedRun, tokenizer: Any, config: Any) -> ComparedRows:
    recipe = Recipe.from_values(**run.settings)
    settings, encoder, source = SftSettings.of(recipe), ConversationEncoder(tokenizer), _source(recipe)
    longest = min(CONVERSATION_TOKENS, settings.max_seq_length, max_positions(config) or CONVERSATION_TOKENS)
    rows = list[Row]()
    for batch in read_batches(source, settings.columns, settings.train_on, encoder):
        own = [row.input_ids.tolist() for row in batch.tokenised[:CONVERSATIONS]]
        if conversations := batch.conversations[:CONVERSATIONS]:
            documents = encoder.encode(conversations)
            own += [[*encoder.prefix.tolist(), *ids] for ids, _ in _documents(documents)]
        rows += [Row(ids[:longest]) for ids in own]
        if len(rows) >= CONVERSATIONS:
            break
    if not rows:
        raise UserError(f"{source.name} has no row to train on")
    return ComparedRows(rows[:CONVERSATIONS], source.name)


def _texts(run: FinishedRun, tokenizer: Any) -> ComparedRows:
    if project_of(run.settings) is not None:
        raise UserError("they are of a project's own form")
    recipe = ClassificationRecipe.from_values(**run.settings)
    settings, source = ClassificationSettings.of(recipe), _source(recipe)
    columns = [column for key in TEXTS if (column := getattr(settings, key)) is not None]
    first = next(source.batches(), list[tuple[int, dict[str, Any]]]())[:TEXT_ROWS]
    cells: list[list[Any]] = [[row.get(column) for _, row in first] for column in columns]
    if not first or not all(isinstance(cell, str) for column in cells for cell in column):
        raise UserError(f"a row of {source.name} has no text")
    of_each = [[clean(text) if settings.clean_text else text for text in column] for column in cells]
    documents = encode_texts(TextEncoder(tokenizer), settings, of_each)
    return ComparedRows([Row(ids, first_type) for ids, first_type in _documents(documents)], source.name)


def _documents(documents: Documents) -> Iterator[tuple[list[int], int | None]]:
    """The tokens of each document, and where its second text begins."""
    types = documents.columns.get(FIRST_TYPE)
    for number in range(len(documents)):
        ids = documents.input_ids[documents.starts[number] : documents.starts[number + 1]]
        yield ids.tolist(), None if types is None else int(types[number])
