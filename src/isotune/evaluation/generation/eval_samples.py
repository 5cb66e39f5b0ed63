"""Prompts and references from conversations: the first question of each conversation of a data set, and its answer."""

from collections.abc import Iterator
from dataclasses import dataclass

from isotune.data.sft.conversations import ASSISTANT_HEADER, HUMAN_HEADER, TEXT_FIELD, read_batches
from isotune.data.sources.source import Source, read_rows
from isotune.evaluation.generation.decoding import first_turn
from isotune.io.errors import UserError


@dataclass(frozen=True)
class EvalSample:
    """The first turn of a conversation.

    Attributes:
        id: its row in the source, from 0.
        reference: the expected answer, stripped; never empty.
        where: its name in messages.
    """

    id: int
    prompt: str
    reference: str
    where: str = "the question"


def read_eval_samples(dataset_name: str, split: str, limit: int | None = None) -> list[EvalSample]:
    """The first question and answer of each conversation of a data set that has them.

    Raises:
        UserError: no such data, or none with a question and an answer at its start.
    """
    source = read_rows(dataset_name, split)
    samples = list(_first_turns(source))[:limit]
    if not samples:
        raise UserError(
            f"dataset_name: {dataset_name!r} has no conversation that begins with a question and an answer: "
            "there is no reference to compare with"
        )
    return samples


def _first_turns(source: Source) -> Iterator[EvalSample]:
    for batch in read_batches(source, TEXT_FIELD, "all"):
        for row, conversation in zip(batch.rows.tolist(), batch.conversations, strict=True):
            start, end = conversation.answers[0]
            prompt = conversation.text[:start].removesuffix(ASSISTANT_HEADER).strip()
            if prompt.startswith(HUMAN_HEADER) and HUMAN_HEADER not in prompt[len(HUMAN_HEADER) :]:
                prompt = prompt.removeprefix(HUMAN_HEADER).strip()
                reference = first_turn(conversation.text[start:end])
                if reference:
                    yield EvalSample(row, prompt, reference, source.where(row))
