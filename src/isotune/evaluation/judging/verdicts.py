"""What a judge is asked of two answers, and how its verdict is read.

Judges prefer what they read first (Zheng et al. 2023, "Judging LLM-as-a-judge with MT-Bench and Chatbot Arena"), so
each pair is asked in both orders, and a row's score is the mean of the two.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

A, B, TIE = 1.0, 0.0, 0.5  # the share of the first answer in a verdict
MARKS = {"A": A, "B": B, "C": TIE}

_MARKED = re.compile(r"\[\[\s*([ABC])\s*\]\]")
_ALONE = re.compile(r"\W*(A|B|C|tie)\W*", re.IGNORECASE)
_ASKED = """\
Two assistants answered the same question. Which answer helps the person who asked more? Look at whether it is right, \
whole and clear, and whether it does what was asked. Neither its length nor whether it comes first counts.

[Question]
{question}
[End of the question]

[Answer A]
{first}
[End of answer A]

[Answer B]
{second}
[End of answer B]

End with your verdict: [[A]] if answer A is better, [[B]] if answer B is better, [[C]] if they are equally good."""


@dataclass(frozen=True)
class Pair:
    """Two answers to a question, in the order in which a judge reads them; `where` names the row in messages."""

    question: str
    first: str
    second: str
    where: str

    @property
    def text(self) -> str:
        """What a judge is asked."""
        fields = {"question": self.question, "first": self.first, "second": self.second}
        return re.sub(r"\{(question|first|second)\}", lambda field: fields[field[1]], _ASKED)


class Judge(Protocol):
    """Who is asked."""

    def verdicts(self, pairs: Sequence[Pair]) -> list[float | None]:
        """The share of each pair's first answer: 1, 0, or 0.5 of a tie; None of a verdict that cannot be read."""
        ...


def read_verdict(said: str) -> float | None:
    """The last [[A]], [[B]] or [[C]] of a text, or one that is nothing but the letter, or `tie`; None of any other."""
    if marked := _MARKED.findall(said):
        return MARKS[marked[-1]]
    if alone := _ALONE.fullmatch(said):
        return MARKS["C" if alone[1].lower() == "tie" else alone[1].upper()]
    return None
