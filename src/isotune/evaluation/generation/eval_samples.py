"""What an instruction-tuned model is asked: the first question of each conversation of a data set, and its answer."""

from collections.abc import Iterator
from dataclasses import dataclass

from isotune.data.sft.batches import TEXT_FIELD, read_batches
from isotune.data.sft.conversations import ASSISTANT_HEADER, HUMAN_HEADER
from isotune.data.sources.source import Source, read_rows
from isotune.evaluation.generation.decoding import first_turn
from isotune.io.errors import UserError


@dataclass(frozen=True)
class EvalSample:
    """The first turn of a conversation.

    Attributes:
        id: its row in the source, from 0.
        where: how an error sentence names it.
        reference: the answer to give, without white space around it; never empty.
    """

    id: int
    prompt: str
    reference: str
    where: str = "the question"


def read_questions(dataset_name: str, split: str, limit: int | None = None) -> list[EvalSample]:
    """The first question and answer of each conversation of a data set that has them.

    Raises:
        UserError: no such data, or none with a question and an answer at its start.
    """
    source = read_rows(dataset_name, split)
    found = list(_questions(source))[:limit]
    if not found:
        raise UserError(
            f"dataset_name: {dataset_name!r} has no conversation that begins with a question and an answer: "
            "there is no reference to compare with"
        )
    return found


def _questions(source: Source) -> Iterator[EvalSample]:
    for batch in read_batches(source, TEXT_FIELD, "all"):
        for row, conversation in zip(batch.rows.tolist(), batch.conversations, strict=True):
            start, end = conversation.answers[0]
            asked = conversation.text[:start].removesuffix(ASSISTANT_HEADER).strip()
            if asked.startswith(HUMAN_HEADER) and HUMAN_HEADER not in asked[len(HUMAN_HEADER) :]:
                prompt = asked.removeprefix(HUMAN_HEADER).strip()
                reference = first_turn(conversation.text[start:end])
                if reference:
                    yield EvalSample(row, prompt, reference, source.where(row))
