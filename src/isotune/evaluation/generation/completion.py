"""Completions of many prompts at once; each is the one that the model generates for its prompt alone.

Prompts are sorted by length and padded on the left; fewer are a batch where a model lets rows change each other
(together.py). Positions follow the attention mask, so padding shifts none. A row may use every position of the
model, however long its neighbours are. The random number of token t of row r is number t of a stream that is seeded
with (seed, r), so a sampled completion is the same in any batch, in any order and on any number of processes. Rules of
the base's generation_config.json are not in effect.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper

from isotune.compat.torch import in_float64
from isotune.data.sft.conversations import HUMAN_HEADER, header_start
from isotune.data.sources.source import surrogate_fault
from isotune.evaluation.distributed_eval import Ranks
from isotune.evaluation.generation.base_rules import without_base_rules
from isotune.evaluation.generation.together import together
from isotune.evaluation.models import GenerationModel
from isotune.io.errors import UserError
from isotune.models.layouts.fitting import FittingBatches, memory_in_one_sentence
from isotune.models.log_control import quiet_libraries

BATCH_SIZE = 16
REMEDY = "shorter texts, a smaller max_new_tokens or 16-bit weights take less"
# A byte-level tokenizer without merges needs one token for each character of the header, and a few before it.
HEADER_TOKENS = len(HUMAN_HEADER) + 6


@dataclass(frozen=True)
class Decoding:
    """How the next token is chosen; UserError for a value out of range, or without effect."""

    max_new_tokens: int = 256
    temperature: float = 0.0  # 0 takes the likeliest token (greedy); above 0 tokens are sampled
    # sample among the likeliest tokens that have this share of the probability (Holtzman et al. 2020)
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


@dataclass(frozen=True)
class Prompt:
    """A text to complete, such as `lm.encoder.prompt` writes; `row` identifies it and seeds its random draws.

    `where` names it in messages.
    """

    row: int
    text: str
    where: str = "the prompt"


@dataclass(frozen=True)
class Completion:
    """The generated text after the prompt."""

    text: str
    tokens: tuple[int, ...]  # without the eos
    ended: bool  # by the model, with an eos or the header of another turn; else by its token limit


def complete(
    lm: GenerationModel,
    prompts: Sequence[Prompt],
    decoding: Decoding,
    *,
    batch_size: int = BATCH_SIZE,
    turns: bool = True,
    ranks: Ranks | None = None,
    progress: bool = False,
    fitting: FittingBatches | None = None,
) -> dict[int, Completion]:
    """The completion of each prompt, by its row; with `ranks` each process generates its share and gets them all.

    The prompts are the same on every rank; one that leaves the model no position is a UserError. `batch_size`, the
    prompts of one forward, changes no completion; `fitting` remembers between calls which batches the device has memory
    for. With `turns` a completion also ends where another turn begins, in Guanaco's form, where no special token says
    so.
    """
    encoded = [prompt_tokens(lm, prompt.text, prompt.where) for prompt in prompts]
    # of similar lengths, the longest first; the same on every rank
    order = sorted(range(len(encoded)), key=lambda i: (-len(encoded[i]), i))
    completions: dict[int, Completion] = {}
    bar = tqdm(total=len(prompts), unit="completion", disable=not progress, dynamic_ncols=True)

    def tokens(batch: Sequence[int]) -> int:
        return len(batch) * (max((len(encoded[i]) for i in batch), default=0) + decoding.max_new_tokens)

    def on_token() -> None:  # a batch may take longer than a rank may be without progress
        if ranks:
            ranks.watchdog.progress()

    def generate(batch: Sequence[int]) -> list[Completion]:
        rows = [prompts[i].row for i in batch]
        return complete_batch(lm, rows, [encoded[i] for i in batch], decoding, turns=turns, on_token=on_token)

    fitting = fitting or FittingBatches(halves=not lm.is_sharded)
    with quiet_libraries(), bar, without_base_rules(lm.model), memory_in_one_sentence(fitting, REMEDY):
        numbers = together(lm, list(map(len, encoded)))
        groups = [list(group) for _, group in groupby(order, numbers.__getitem__)]
        batches = [group[start : start + batch_size] for group in groups for start in range(0, len(group), batch_size)]
        costs = [len(batch) * len(encoded[batch[0]]) for batch in batches]
        for batch in own_batches(lm, batches, costs, ranks):
            for part, generated in fitting.run(batch, tokens, generate):
                completions |= zip((prompts[i].row for i in part), generated, strict=True)
                bar.update(len(part))
    return ranks.gather(completions) if ranks else completions


def prompt_tokens(lm: GenerationModel, text: str, where: str) -> list[int]:
    """The tokens of a prompt; UserError, which calls it `where`, if it is not UTF-8 or leaves the model no position."""
    if fault := surrogate_fault(text):
        raise UserError(f"{where} {fault}")
    tokens = lm.encoder.prompt_tokens(text)
    if (count := len(tokens)) >= lm.positions:
        raise UserError(f"{where} has {count} tokens, and the model {lm.positions} positions: shorten it")
    return tokens


def own_batches(
    lm: GenerationModel, batches: list[list[int]], costs: Sequence[int], ranks: Ranks | None
) -> Iterator[list[int]]:
    """The batches of rows that this rank runs, balanced by cost.

    A sharded model needs every rank in every forward, so a rank that has done its share gets empty batches.
    """
    mine = ranks.share(costs) if ranks else range(len(costs))
    forwards = max(ranks.gather({ranks.rank: len(mine)}).values()) if ranks and lm.is_sharded else len(mine)
    for place in range(forwards):
        if ranks:
            ranks.watchdog.progress(f"batch {place + 1} of its {forwards}")
        yield batches[mine[place]] if place < len(mine) else []


class Watcher(Protocol):
    """Is told of each row of a batch as it grows; rows are counted within the batch."""

    def choose(self, scores: torch.Tensor) -> None:
        """Look at the scores, [rows, vocabulary], from which the next token of each row is chosen."""
        ...

    def token(self, row: int, token: int) -> bool:
        """A new token of a row, which is no eos; false ends the row."""
        ...

    def end(self, row: int, by_model: bool) -> None:
        """A row has ended, by the model or otherwise."""
        ...


def complete_batch(
    lm: GenerationModel,
    rows: list[int],
    encoded: list[list[int]],
    decoding: Decoding,
    *,
    turns: bool = True,
    limits: Sequence[int] | None = None,
    watcher: Watcher | None = None,
    on_token: Callable[[], None] = lambda: None,
) -> list[Completion]:
    """The completions of prompts that are tokens already, by one call of `generate`.

    `limits` are the most new tokens of each row, by default those of `decoding`; `on_token` is called when the rows
    have got one more. Without rows it only serves the ranks that have some. Call it within `without_base_rules`.
    """
    eos_ids = lm.eos_ids
    pad = lm.tokenizer.pad_token_id
    filler = pad if pad is not None else min(eos_ids)
    most = [decoding.max_new_tokens] * len(encoded) if limits is None else limits
    limits = [min(limit, lm.positions - len(tokens)) for limit, tokens in zip(most, encoded, strict=True)] or [1]
    tokens = encoded or [[filler]]
    left: dict[str, Any] = {"batch_first": True, "padding_side": "left"}
    input_ids = pad_sequence([torch.tensor(ids) for ids in tokens], padding_value=filler, **left)
    mask = pad_sequence([torch.ones(len(ids), dtype=torch.long) for ids in tokens], **left)
    width = input_ids.shape[1]
    endings = _Endings(lm, width, limits, turns and lm.encoder.template is None, watcher, on_token)
    processors = LogitsProcessorList([] if watcher is None else [_Shown(watcher)])
    if decoding.temperature > 0:
        processors.append(TemperatureLogitsWarper(decoding.temperature))
        processors += [TopPLogitsWarper(decoding.top_p)] if decoding.top_p < 1 else []
        processors.append(CountedDraw(decoding, rows or [0], width))
    with torch.no_grad(), _within_positions(lm):
        outputs = lm.model.generate(
            input_ids=input_ids.to(lm.device),
            attention_mask=mask.to(lm.device),
            do_sample=False,  # sampling is done by the last of the logits processors
            max_new_tokens=max(limits),
            eos_token_id=sorted(eos_ids),
            pad_token_id=filler,
            logits_processor=processors,
            stopping_criteria=StoppingCriteriaList([endings]),
            synced_gpus=lm.is_sharded,
        )
    completions = []
    for row, output in enumerate(outputs[: len(encoded)]):
        kept = output[width:].tolist()[: endings.tokens[row]]
        text = lm.tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        completions.append(Completion(text, tuple(kept), endings.ended_by_model[row]))
    return completions


def _within_positions(lm: GenerationModel) -> AbstractContextManager[Any]:
    """A hook that keeps the positions of rows that have ended within the model's position table, where it has one.

    transformers 5.23 keeps counting positions for a row that has ended, until the last row of its batch and, under
    ZeRO-3, of all ranks ends; learned positions such as OPT's then overflow their table.
    """

    if lm.last_position is None:
        return contextlib.nullcontext()
    last = lm.last_position

    def clamp(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = kwargs["position_ids"].clamp(max=last)
        return args, kwargs

    return lm.model.register_forward_pre_hook(clamp, with_kwargs=True)


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
        cumulative = in_float64(scores).softmax(-1).cumsum(-1)
        threshold = self.uniform[:, position : position + 1].to(cumulative.device) * cumulative[:, -1:]
        token = torch.searchsorted(cumulative, threshold, right=True).clamp_(max=scores.shape[-1] - 1)
        return torch.full_like(scores, float("-inf")).scatter_(1, token.to(scores.device), 0.0)


class _Endings(StoppingCriteria):
    """Where each completion of a batch ends: at an eos, at the header of another turn, or at its token limit."""

    def __init__(
        self,
        lm: GenerationModel,
        width: int,
        limits: Sequence[int],
        turns: bool,
        watcher: Watcher | None,
        on_token: Callable[[], None],
    ) -> None:
        """Watch rows whose padded prompts are `width` wide; `turns`: end before the header of another turn too.

        `on_token` is called when the rows have got another token.
        """
        self.tokenizer = lm.tokenizer
        self.eos_ids = lm.eos_ids
        self.width = width
        self.limits = limits
        self.turns = turns
        self.watcher = watcher
        self.on_token = on_token
        self.tokens: list[int | None] = [None] * len(limits)  # of each completion without its eos, once it has ended
        self.ended_by_model = [False] * len(limits)  # by an eos or a header

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        """Bool [rows]: which rows have ended. `input_ids` is [rows, width + new tokens]."""
        self.on_token()
        count = input_ids.shape[1] - self.width
        # only the last tokens can hold a header that was not there before
        newest = input_ids[:, max(self.width, input_ids.shape[1] - HEADER_TOKENS) :].tolist()
        for row, limit in enumerate(self.limits):
            if self.tokens[row] is not None:
                continue
            if newest[row][-1] in self.eos_ids:
                self.tokens[row], self.ended_by_model[row] = count - 1, True
            elif self.turns and header_start(self.tokenizer.decode(newest[row], skip_special_tokens=True)) is not None:
                self.tokens[row], self.ended_by_model[row] = count, True
            elif count >= limit:
                self.tokens[row] = count
            if self.watcher is not None:
                self._tell(self.watcher, row, count, newest[row][-1])
        return torch.tensor([ended is not None for ended in self.tokens], device=input_ids.device)

    def _tell(self, watcher: Watcher, row: int, count: int, token: int) -> None:
        """Tell of the newest token of a row, which is its number `count`, and of its end."""
        if token not in self.eos_ids and not watcher.token(row, token) and self.tokens[row] is None:
            self.tokens[row] = count
        if self.tokens[row] is not None:
            watcher.end(row, self.ended_by_model[row])


class _Shown(LogitsProcessor):
    """Shows the scores to a watcher, and leaves them as they are."""

    def __init__(self, watcher: Watcher) -> None:
        self.watcher = watcher

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The scores, [rows, vocabulary]."""
        self.watcher.choose(scores)
        return scores
