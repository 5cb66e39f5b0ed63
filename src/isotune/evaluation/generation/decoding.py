"""How the next token is chosen and when an answer ends, so that an answer depends on its own row and on no other.

Chance is counted, not carried: the draw of token t of row r comes from place t of a stream that is seeded with
(seed, r). A drawn answer is therefore the same in any batch, in any order and on any number of processes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria
from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper

from isotune.data.sft.conversations import HEADER, HUMAN_HEADER
from isotune.io.errors import UserError

# A byte-level tokenizer without merges needs one token a character of the header, and a few before it.
HEADER_TOKENS = len(HUMAN_HEADER) + 6


@dataclass(frozen=True)
class Decoding:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: longest answer.
        temperature: 0 takes the likeliest token (greedy); above it tokens are drawn.
        top_p: draw among the likeliest tokens that hold this share of the probability (Holtzman et al. 2020).
        seed: of the draw; the same seed gives the same answer.

    Raises:
        UserError: a value out of its range, or one without effect.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"--max_new_tokens is {self.max_new_tokens}: an answer takes at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"--temperature is {self.temperature}: it may be 0 (greedy) or a positive number")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top_p is {self.top_p}: it is a share of the probability, above 0 and at most 1")
        if self.temperature == 0 and self.top_p < 1:
            raise UserError("--top_p has no effect on greedy decoding: give a --temperature above 0 too")
        if self.seed < 0:
            raise UserError(f"--seed is {self.seed}: it may be 0 or a positive number")

    def processors(self, rows: Sequence[int], prompt_tokens: int) -> LogitsProcessorList:
        """What `generate` does to the scores of a batch before it takes the likeliest token.

        Args:
            rows: the number of each row of the batch, which its chance is counted from.
            prompt_tokens: width of the padded prompts.
        """
        if self.temperature == 0:
            return LogitsProcessorList()
        shaped: list[Any] = [TemperatureLogitsWarper(self.temperature)]
        if self.top_p < 1:
            shaped.append(TopPLogitsWarper(self.top_p))
        return LogitsProcessorList([*shaped, CountedDraw(self, rows, prompt_tokens)])


class CountedDraw(LogitsProcessor):
    """Draw each row's token by inverting its distribution function at a number that the row and the place count out.

    One number a token is all that chance decides, so rounding in the scores (another batch, another device) changes a
    token only where the number falls within that rounding of a border between two tokens.
    """

    def __init__(self, decoding: Decoding, rows: Sequence[int], prompt_tokens: int) -> None:
        streams = [np.random.Philox(np.random.SeedSequence([decoding.seed, row])) for row in rows]
        drawn = [np.random.Generator(stream).random(decoding.max_new_tokens) for stream in streams]
        self.uniform = torch.from_numpy(np.stack(drawn))  # [rows, max_new_tokens], float64 in [0, 1)
        self.prompt_tokens = prompt_tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores [rows, vocabulary] that leave the drawn token alone."""
        place = input_ids.shape[1] - self.prompt_tokens
        reached = scores.double().softmax(-1).cumsum(-1)
        wanted = self.uniform[:, place : place + 1].to(reached.device) * reached[:, -1:]
        token = torch.searchsorted(reached, wanted, right=True).clamp_(max=scores.shape[-1] - 1)
        return torch.full_like(scores, float("-inf")).scatter_(1, token, 0.0)


class Endings(StoppingCriteria):
    """Where each answer of a batch ends: at an eos, where the model begins another turn, or at its allowance.

    Attributes:
        tokens: of each row's answer, its eos not counted; None while it goes on.
        by_itself: whether the model ended it.
    """

    def __init__(self, tokenizer: Any, eos_ids: set[int], width: int, allowances: Sequence[int], turns: bool) -> None:
        """Watch rows whose padded prompts are `width` wide; `turns`: end before the header of another turn too."""
        self.tokenizer = tokenizer
        self.eos_ids = eos_ids
        self.width = width
        self.allowances = allowances
        self.turns = turns
        self.tokens: list[int | None] = [None] * len(allowances)
        self.by_itself = [False] * len(allowances)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        """Bool [rows]: which rows have ended. `input_ids` is [rows, width and answers so far]."""
        count = input_ids.shape[1] - self.width
        # only the end can hold a header that was not there before
        newest = input_ids[:, max(self.width, input_ids.shape[1] - HEADER_TOKENS) :].tolist()
        for row, ended in enumerate(self.tokens):
            if ended is None:
                self._look(row, newest[row], count)
        return torch.tensor([ended is not None for ended in self.tokens], device=input_ids.device)

    def _look(self, row: int, newest: list[int], count: int) -> None:
        if newest[-1] in self.eos_ids:
            self.tokens[row], self.by_itself[row] = count - 1, True
        elif self.turns and header_start(self.tokenizer.decode(newest, skip_special_tokens=True)) is not None:
            self.tokens[row], self.by_itself[row] = count, True
        elif count >= self.allowances[row]:
            self.tokens[row] = count


def header_start(text: str) -> int | None:
    """Where the first header of a turn begins in a text, as training reads headers; None where there is none."""
    return next((h.start() for h in HEADER.finditer(text) if text[h.start() - 1 : h.start()] != "#"), None)


def first_turn(text: str) -> str:
    """What stands before the header of another turn, without the white space around it."""
    return text[: header_start(text)].strip()
