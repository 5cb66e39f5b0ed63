"""How the next token is chosen and when a completion ends, so that a completion depends on its own row alone.

The random number of token t of row r is number t of a stream that is seeded with (seed, r). A sampled completion is
therefore the same in any batch, in any order and on any number of processes.
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

# A byte-level tokenizer without merges needs one token for each character of the header, and a few before it.
HEADER_TOKENS = len(HUMAN_HEADER) + 6


@dataclass(frozen=True)
class Decoding:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: longest completion.
        temperature: 0 takes the likeliest token (greedy); above 0 tokens are sampled.
        top_p: sample among the likeliest tokens that have this share of the probability (Holtzman et al. 2020).
        seed: of sampling; the same seed gives the same completion.

    Raises:
        UserError: a value out of range, or without effect.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"--max_new_tokens is {self.max_new_tokens}: it is at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"--temperature is {self.temperature}: it is 0 (greedy) or a positive number")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top_p is {self.top_p}: it is a share of the probability, above 0 and at most 1")
        if self.temperature == 0 and self.top_p < 1:
            raise UserError("--top_p has no effect on greedy decoding: give a --temperature above 0 too")
        if self.seed < 0:
            raise UserError(f"--seed is {self.seed}: it is 0 or a positive number")

    def processors(self, rows: Sequence[int], prompt_tokens: int) -> LogitsProcessorList:
        """The logits processors of a batch; `generate` takes the likeliest token of their result.

        Args:
            rows: the number of each row of the batch, which seeds its random draws.
            prompt_tokens: width of the padded prompts.
        """
        if self.temperature == 0:
            return LogitsProcessorList()
        warpers: list[Any] = [TemperatureLogitsWarper(self.temperature)]
        if self.top_p < 1:
            warpers.append(TopPLogitsWarper(self.top_p))
        return LogitsProcessorList([*warpers, CountedDraw(self, rows, prompt_tokens)])


class CountedDraw(LogitsProcessor):
    """Sample each row's token by inverting its distribution function at a number that (seed, row, position) determine.

    Rounding in the scores (another batch, another device) changes a token only where that number falls within the
    rounding of the border between two tokens.
    """

    def __init__(self, decoding: Decoding, rows: Sequence[int], prompt_tokens: int) -> None:
        streams = [np.random.Philox(np.random.SeedSequence([decoding.seed, row])) for row in rows]
        drawn = [np.random.Generator(stream).random(decoding.max_new_tokens) for stream in streams]
        self.uniform = torch.from_numpy(np.stack(drawn))  # [rows, max_new_tokens], float64 in [0, 1)
        self.prompt_tokens = prompt_tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores [rows, vocabulary] that are finite for the sampled token only."""
        position = input_ids.shape[1] - self.prompt_tokens
        cumulative = scores.double().softmax(-1).cumsum(-1)
        threshold = self.uniform[:, position : position + 1].to(cumulative.device) * cumulative[:, -1:]
        token = torch.searchsorted(cumulative, threshold, right=True).clamp_(max=scores.shape[-1] - 1)
        return torch.full_like(scores, float("-inf")).scatter_(1, token, 0.0)


class Endings(StoppingCriteria):
    """Where each completion of a batch ends: at an eos, at the header of another turn, or at its token limit.

    Attributes:
        tokens: length of each row's completion without its eos; None while it goes on.
        ended_by_model: whether an eos or a header ended it.
    """

    def __init__(self, tokenizer: Any, eos_ids: set[int], width: int, limits: Sequence[int], turns: bool) -> None:
        """Watch rows whose padded prompts are `width` wide; `turns`: end before the header of another turn too."""
        self.tokenizer = tokenizer
        self.eos_ids = eos_ids
        self.width = width
        self.limits = limits
        self.turns = turns
        self.tokens: list[int | None] = [None] * len(limits)
        self.ended_by_model = [False] * len(limits)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        """Bool [rows]: which rows have ended. `input_ids` is [rows, width + new tokens]."""
        count = input_ids.shape[1] - self.width
        # only the last tokens can hold a header that was not there before
        newest = input_ids[:, max(self.width, input_ids.shape[1] - HEADER_TOKENS) :].tolist()
        for row, ended in enumerate(self.tokens):
            if ended is None:
                self._check_row(row, newest[row], count)
        return torch.tensor([ended is not None for ended in self.tokens], device=input_ids.device)

    def _check_row(self, row: int, newest: list[int], count: int) -> None:
        if newest[-1] in self.eos_ids:
            self.tokens[row], self.ended_by_model[row] = count - 1, True
        elif self.turns and header_start(self.tokenizer.decode(newest, skip_special_tokens=True)) is not None:
            self.tokens[row], self.ended_by_model[row] = count, True
        elif count >= self.limits[row]:
            self.tokens[row] = count


def header_start(text: str) -> int | None:
    """Where the first header of a turn starts in a text, by the rules of training; None where there is none."""
    return next((h.start() for h in HEADER.finditer(text) if text[h.start() - 1 : h.start()] != "#"), None)


def first_turn(text: str) -> str:
    """The text before the header of another turn, stripped."""
    return text[: header_start(text)].strip()
