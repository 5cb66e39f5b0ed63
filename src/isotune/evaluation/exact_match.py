"""The plainest question about an instruction-tuned model: how often is its answer, letter for letter, the reference?"""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from isotune.data.batches import TEXT_FIELD, read_batches
from isotune.data.conversations import ASSISTANT_HEADER, HUMAN_HEADER
from isotune.data.sources import read_rows
from isotune.errors import UserError
from isotune.evaluation.generation import Decoding, answer, first_turn


@dataclass(frozen=True)
class Question:
    """The first turn of a conversation: `id` is its row in the source."""

    id: int
    prompt: str
    reference: str


@dataclass(frozen=True)
class Answered:
    """A question with the model's answer; `match` after white space around both is taken away."""

    id: int
    prompt: str
    reference: str
    text: str
    match: bool


def questions(dataset_name: str, split: str, limit: int | None = None) -> list[Question]:
    """The first question and answer of each conversation of a data set.

    Raises:
        UserError: no such data, or none with a question and an answer at its start.
    """
    found = list(_questions(dataset_name, split))[:limit]
    if not found:
        raise UserError(f"dataset_name: {dataset_name!r} has no conversation that begins with a question and an answer")
    return found


def _questions(dataset_name: str, split: str) -> Iterator[Question]:
    for batch in read_batches(read_rows(dataset_name, split), TEXT_FIELD, "all"):
        for row, conversation in zip(batch.rows, batch.conversations, strict=True):
            start, end = conversation.answers[0]
            asked = conversation.text[:start].removesuffix(ASSISTANT_HEADER).strip()
            if asked.startswith(HUMAN_HEADER) and HUMAN_HEADER not in asked[len(HUMAN_HEADER) :]:
                prompt = asked.removeprefix(HUMAN_HEADER).strip()
                yield Question(int(row), prompt, first_turn(conversation.text[start:end]))


def ask(generator: Any, asked: list[Question], decoding: Decoding) -> list[Answered]:
    """Answer every question, with a progress bar."""
    return [
        Answered(q.id, q.prompt, q.reference, text, text == q.reference.strip())
        for q in tqdm(asked, unit="question", dynamic_ncols=True)
        for text in [answer(generator, q.prompt, decoding).strip()]
    ]


def exact_match(answers: list[Answered]) -> float:
    """The share of answers that are the reference."""
    return sum(a.match for a in answers) / len(answers)


def write(answers: list[Answered], folder: Path, facts: dict[str, Any]) -> None:
    """metrics.json and predictions.jsonl in `folder`, each renamed into place when whole."""
    folder.mkdir(parents=True, exist_ok=True)
    metrics = {"exact_match": exact_match(answers), "questions": len(answers), **facts}
    _replace(folder / "predictions.jsonl", "".join(json.dumps(asdict(a)) + "\n" for a in answers))
    _replace(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")


def _replace(file: Path, text: str) -> None:
    unfinished = file.with_name(file.name + ".unfinished")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, file)
