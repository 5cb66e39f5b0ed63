"""Answers to many prompts at once, each the one that the model would give to its prompt alone.

Prompts are sorted by length and padded on the left. Positions follow the attention mask, so padding moves none. A row
may run to the model's last position whatever its neighbours' lengths are.
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
    """A model ready to be asked.

    Attributes:
        model: on its device; under ZeRO-3 the part of it that this rank holds.
        tokenizer: that belongs to it.
        sharded: every rank must take part in every forward pass.
        engine: what keeps a sharded model working.
    """

    model: Any
    tokenizer: Any
    sharded: bool = False
    engine: Any = None

    @property
    def device(self) -> torch.device:
        """Where its inputs go."""
        return self.model.device

    @property
    def positions(self) -> int:
        """Tokens that the model has positions for; without a limit of its own, the tokenizer's."""
        limit = getattr(self.model.config, "max_position_embeddings", None)
        return limit or self.tokenizer.model_max_length

    @property
    def eos_ids(self) -> set[int]:
        """Every token that ends an answer: the tokenizer's and those of the model's generation_config.json."""
        named = self.model.generation_config.eos_token_id
        ids = {*(named if isinstance(named, list) else [named]), self.tokenizer.eos_token_id} - {None}
        if not ids:
            raise UserError(f"the tokenizer {self.tokenizer.name_or_path} has no eos token: an answer could not end")
        return ids

    def token_count(self, text: str) -> int:
        """Tokens of a prompt, special ones included."""
        return len(self.tokenizer(text)["input_ids"])


@dataclass(frozen=True)
class Prompt:
    """A text to go on from; `row` names it and counts out its chance, `where` names it in an error sentence."""

    row: int
    text: str
    where: str = "the prompt"


@dataclass(frozen=True)
class Completion:
    """What the model went on with: the text after the prompt's and its tokens, without the eos.

    Attributes:
        ended: the model ended it, by an eos or by another turn's header; else its allowance did.
    """

    text: str
    tokens: tuple[int, ...]
    ended: bool


def complete(
    speaker: GenerationModel,
    prompts: Sequence[Prompt],
    decoding: Decoding,
    *,
    batch_size: int = BATCH_SIZE,
    turns: bool = True,
    ranks: Ranks | None = None,
    progress: bool = False,
) -> dict[int, Completion]:
    """The completion of each prompt, by its row; with `ranks` each process makes its share and gets them all.

    Args:
        speaker: on every rank.
        prompts: with a row number each; the same on every rank.
        decoding: how tokens are chosen.
        batch_size: prompts that one forward pass sees; it changes no answer.
        turns: an answer also ends where the model begins another turn.
        ranks: what `start_ranks` returned; None on one process.
        progress: show a bar.

    Raises:
        UserError: a prompt leaves the model no position for an answer.
    """
    with quiet_libraries():  # the tokenizer warns of a long prompt, which is refused below
        encoded = [speaker.tokenizer(prompt.text)["input_ids"] for prompt in prompts]
    for prompt, tokens in zip(prompts, encoded, strict=True):
        if len(tokens) >= speaker.positions:
            sizes = f"{len(tokens)} tokens, and the model {speaker.positions} positions"
            raise UserError(f"{prompt.where} has {sizes}: shorten it")
    batches = sorted_batches([len(tokens) for tokens in encoded], batch_size)
    mine, rounds = own_share(speaker, [len(batch) * len(encoded[batch[0]]) for batch in batches], ranks)
    made: dict[int, Completion] = {}
    with quiet_libraries(), tqdm(total=len(prompts), unit="answer", disable=not progress, dynamic_ncols=True) as bar:
        for number in range(rounds):
            batch = batches[mine[number]] if number < len(mine) else []
            some = _complete_batch(
                speaker, [prompts[i].row for i in batch], [encoded[i] for i in batch], decoding, turns
            )
            made |= {prompts[i].row: completion for i, completion in zip(batch, some, strict=True)}
            bar.update(len(batch))
    return ranks.gather(made) if ranks else made


def own_share(speaker: GenerationModel, costs: Sequence[int], ranks: Ranks | None) -> tuple[list[int], int]:
    """The numbers of the batches that this rank runs, by cost, and how many rounds it must go.

    A sharded model needs every rank in every round; in one beyond its share a rank runs something empty.
    """
    if ranks is None:
        return list(range(len(costs))), len(costs)
    mine = ranks.share(costs)
    return mine, max(ranks.gather({ranks.rank: len(mine)}).values()) if speaker.sharded else len(mine)


def sorted_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Numbers of rows in batches of about one length, the longest first; the same on every rank."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _complete_batch(
    speaker: GenerationModel, rows: list[int], encoded: list[list[int]], decoding: Decoding, turns: bool
) -> list[Completion]:
    """One call of `generate`; without rows only for the sake of the ranks that have some."""
    eos_ids = speaker.eos_ids
    pad = speaker.tokenizer.pad_token_id
    filler = pad if pad is not None else min(eos_ids)
    allowances = [min(decoding.max_new_tokens, speaker.positions - len(tokens)) for tokens in encoded] or [1]
    tokens = encoded or [[filler]]
    width = max(map(len, tokens))
    input_ids = torch.full((len(tokens), width), filler)
    mask = torch.zeros_like(input_ids)
    for place, row in enumerate(tokens):
        input_ids[place, width - len(row) :] = torch.tensor(row)
        mask[place, width - len(row) :] = 1
    endings = Endings(speaker.tokenizer, eos_ids, width, allowances, turns)
    from transformers import StoppingCriteriaList

    with torch.no_grad(), _within_positions(speaker):
        continued = speaker.model.generate(
            input_ids=input_ids.to(speaker.device),
            attention_mask=mask.to(speaker.device),
            do_sample=False,  # a draw, where one is asked for, is made by the last of the processors
            max_new_tokens=max(allowances),
            eos_token_id=sorted(eos_ids),
            pad_token_id=filler,
            logits_processor=decoding.processors(rows or [0], width),
            stopping_criteria=StoppingCriteriaList([endings]),
            synced_gpus=speaker.sharded,
        )
    return [
        _completion(speaker.tokenizer, answer[width:].tolist(), endings, place)
        for place, answer in enumerate(continued[: len(encoded)])
    ]


def _completion(tokenizer: Any, tokens: list[int], endings: Endings, place: int) -> Completion:
    kept = tokens[: endings.tokens[place]]
    text = tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return Completion(text, tuple(kept), endings.by_itself[place])


@contextmanager
def _within_positions(speaker: GenerationModel) -> Iterator[None]:
    """Keep the positions of rows that have ended within the model's table.

    transformers 5.23 counts on for a row that has ended, until the last of its batch and, under ZeRO-3, of all ranks
    ends; learned positions such as OPT's then fall out of their table. What is computed for such a row is not used.
    """

    def clamp(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = kwargs["position_ids"].clamp(max=speaker.positions - 1)
        return args, kwargs

    hook = speaker.model.register_forward_pre_hook(clamp, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
