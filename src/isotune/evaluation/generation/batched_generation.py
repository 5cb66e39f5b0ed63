"""Completions of many prompts at once; each is the one that the model generates for its prompt alone.

Prompts are sorted by length and padded on the left. Positions follow the attention mask, so padding shifts none. A row
may use every position of the model, however long its neighbours are.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from isotune.evaluation.distributed_eval import Ranks
from isotune.evaluation.generation.decoding import Decoding, Endings
from isotune.io.errors import UserError
from isotune.models.log_control import quiet_libraries

BATCH_SIZE = 16


@dataclass(frozen=True)
class GenerationModel:
    """A causal language model with its tokenizer, ready to generate.

    Attributes:
        model: on its device; under ZeRO-3 the shard of this rank.
        tokenizer: the model's own.
        sharded: every rank must take part in every forward.
        engine: the DeepSpeed engine of a sharded model.
    """

    model: Any
    tokenizer: Any
    sharded: bool = False
    engine: Any = None

    @property
    def device(self) -> torch.device:
        """The device of its inputs."""
        return self.model.device

    @property
    def positions(self) -> int:
        """The longest sequence of the model in tokens; the tokenizer's limit where the model has none."""
        limit = getattr(self.model.config, "max_position_embeddings", None)
        return limit or self.tokenizer.model_max_length

    @property
    def eos_ids(self) -> set[int]:
        """Every eos token: the tokenizer's and those of the model's generation_config.json."""
        named = self.model.generation_config.eos_token_id
        ids = {*(named if isinstance(named, list) else [named]), self.tokenizer.eos_token_id} - {None}
        if not ids:
            raise UserError(f"the tokenizer {self.tokenizer.name_or_path} has no eos token: generation could not end")
        return ids

    def token_count(self, text: str) -> int:
        """Tokens of a prompt, special ones included."""
        return len(self.tokenizer(text)["input_ids"])


@dataclass(frozen=True)
class Prompt:
    """A text to complete; `row` identifies it and seeds its random draws, `where` names it in messages."""

    row: int
    text: str
    where: str = "the prompt"


@dataclass(frozen=True)
class Completion:
    """The generated text after the prompt and its tokens, without the eos.

    Attributes:
        ended: the model ended it, by an eos or by the header of another turn; else its token limit did.
    """

    text: str
    tokens: tuple[int, ...]
    ended: bool


def complete(
    lm: GenerationModel,
    prompts: Sequence[Prompt],
    decoding: Decoding,
    *,
    batch_size: int = BATCH_SIZE,
    turns: bool = True,
    ranks: Ranks | None = None,
    progress: bool = False,
) -> dict[int, Completion]:
    """The completion of each prompt, by its row; with `ranks` each process generates its share and gets them all.

    Args:
        lm: on every rank.
        prompts: with a row number each; the same on every rank.
        decoding: how tokens are chosen.
        batch_size: prompts of one forward; it changes no completion.
        turns: a completion also ends where the model begins another turn.
        ranks: what `start_ranks` returned; None on one process.
        progress: show a progress bar.

    Raises:
        UserError: a prompt leaves the model no position for a completion.
    """
    with quiet_libraries():  # the tokenizer warns about a long prompt, which is refused below
        encoded = [lm.tokenizer(prompt.text)["input_ids"] for prompt in prompts]
    for prompt, tokens in zip(prompts, encoded, strict=True):
        if len(tokens) >= lm.positions:
            sizes = f"{len(tokens)} tokens, and the model {lm.positions} positions"
            raise UserError(f"{prompt.where} has {sizes}: shorten it")
    batches = sorted_batches([len(tokens) for tokens in encoded], batch_size)
    mine, rounds = own_share(lm, [len(batch) * len(encoded[batch[0]]) for batch in batches], ranks)
    completions: dict[int, Completion] = {}
    with (
        quiet_libraries(),
        tqdm(total=len(prompts), unit="completion", disable=not progress, dynamic_ncols=True) as bar,
    ):
        for number in range(rounds):
            batch = batches[mine[number]] if number < len(mine) else []
            generated = _complete_batch(
                lm, [prompts[i].row for i in batch], [encoded[i] for i in batch], decoding, turns
            )
            completions |= {prompts[i].row: completion for i, completion in zip(batch, generated, strict=True)}
            bar.update(len(batch))
    return ranks.gather(completions) if ranks else completions


def own_share(lm: GenerationModel, costs: Sequence[int], ranks: Ranks | None) -> tuple[list[int], int]:
    """The numbers of the batches that this rank runs, balanced by cost, and how many rounds it takes part in.

    A sharded model needs every rank in every round; in a round beyond its share a rank runs an empty batch.
    """
    if ranks is None:
        return list(range(len(costs))), len(costs)
    mine = ranks.share(costs)
    return mine, max(ranks.gather({ranks.rank: len(mine)}).values()) if lm.sharded else len(mine)


def sorted_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Numbers of rows in batches of similar lengths, the longest first; the same on every rank."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _complete_batch(
    lm: GenerationModel, rows: list[int], encoded: list[list[int]], decoding: Decoding, turns: bool
) -> list[Completion]:
    """One call of `generate`; without rows it only serves the ranks that have some."""
    eos_ids = lm.eos_ids
    pad = lm.tokenizer.pad_token_id
    filler = pad if pad is not None else min(eos_ids)
    limits = [min(decoding.max_new_tokens, lm.positions - len(tokens)) for tokens in encoded] or [1]
    tokens = encoded or [[filler]]
    width = max(map(len, tokens))
    input_ids = torch.full((len(tokens), width), filler)
    mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(tokens):
        input_ids[row, width - len(ids) :] = torch.tensor(ids)
        mask[row, width - len(ids) :] = 1
    endings = Endings(lm.tokenizer, eos_ids, width, limits, turns)
    from transformers import StoppingCriteriaList

    with torch.no_grad(), _within_positions(lm):
        outputs = lm.model.generate(
            input_ids=input_ids.to(lm.device),
            attention_mask=mask.to(lm.device),
            do_sample=False,  # sampling is done by the last of the logits processors
            max_new_tokens=max(limits),
            eos_token_id=sorted(eos_ids),
            pad_token_id=filler,
            logits_processor=decoding.processors(rows or [0], width),
            stopping_criteria=StoppingCriteriaList([endings]),
            synced_gpus=lm.sharded,
        )
    return [
        _completion(lm.tokenizer, output[width:].tolist(), endings, row)
        for row, output in enumerate(outputs[: len(encoded)])
    ]


def _completion(tokenizer: Any, tokens: list[int], endings: Endings, row: int) -> Completion:
    kept = tokens[: endings.tokens[row]]
    text = tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return Completion(text, tuple(kept), endings.ended_by_model[row])


@contextmanager
def _within_positions(lm: GenerationModel) -> Iterator[None]:
    """Keep the positions of rows that have ended within the model's position table.

    transformers 5.23 keeps counting positions for a row that has ended, until the last row of its batch and, under
    ZeRO-3, of all ranks ends; learned positions such as OPT's then overflow their table. The output of such a row is
    not used.
    """

    def clamp(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = kwargs["position_ids"].clamp(max=lm.positions - 1)
        return args, kwargs

    hook = lm.model.register_forward_pre_hook(clamp, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
