"""The likelihood of references: no sampling and, in bits per byte, no dependence on the tokenizer.

The tokens of the reference are scored, not those of the prompt and not the eos. They are those of training, where
prompt and answer are tokenised as one text. The batches depend on the references alone and not on the number of
processes, so the sums are the same everywhere.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from isotune.evaluation.distributed_eval import Ranks
from isotune.evaluation.generation.completion import own_share
from isotune.evaluation.metrics.text import Likelihood
from isotune.evaluation.models import GenerationModel
from isotune.io.errors import UserError

BATCH_TOKENS = 2048  # of one forward, padding included; a longer row runs alone
CHUNK_POSITIONS = 256  # positions whose logits are converted to float64 at a time


@dataclass(frozen=True)
class Reference:
    """A text that is scored after a prompt; `row` identifies it."""

    row: int
    prompt: str
    text: str


def score_references(
    lm: GenerationModel, references: Sequence[Reference], ranks: Ranks | None = None
) -> dict[int, Likelihood]:
    """The likelihood of each reference by its row; with `ranks` each process scores its share and gets them all.

    Raises:
        UserError: the tokenizer gives no character offsets, or a likelihood is NaN or Inf.
    """
    encoded = [_encode(lm, reference) for reference in references]
    batches = _batches([len(row.input_ids) for row in encoded])
    mine, rounds = own_share(lm, [sum(len(encoded[i].input_ids) for i in batch) for batch in batches], ranks)
    own: dict[int, Likelihood] = {}
    for number in range(rounds):
        batch = batches[mine[number]] if number < len(mine) else []
        for i, nll in zip(batch, _score_batch(lm, [encoded[i] for i in batch]), strict=True):
            row = encoded[i]
            own[references[i].row] = Likelihood(nll, len(row.input_ids) - row.first, row.bytes, row.whole)
    likelihoods = ranks.gather(own) if ranks else own
    broken = sorted(row for row, likelihood in likelihoods.items() if not math.isfinite(likelihood.nll))
    if broken:
        raise UserError(
            f"the model's scores are not finite for {len(broken)} of {len(likelihoods)} references, row "
            f"{broken[0] + 1} first: its weights are broken, or its precision is too small for them"
        )
    return likelihoods


@dataclass(frozen=True)
class _Encoded:
    """A prompt with its reference; the tokens from `first` on are scored."""

    input_ids: list[int]
    first: int
    bytes: int
    whole: bool


def _encode(lm: GenerationModel, reference: Reference) -> _Encoded:
    whole_text = reference.prompt + reference.text
    try:
        tokens = lm.tokenizer(whole_text, return_offsets_mapping=True, return_special_tokens_mask=True)
    except NotImplementedError:
        name = lm.tokenizer.name_or_path
        raise UserError(
            f"the tokenizer {name} gives no character offsets: save its fast form, tokenizer.json"
        ) from None
    start = len(reference.prompt)
    ends = [end for _, end in tokens["offset_mapping"]]
    specials = tokens["special_tokens_mask"]
    # a token across the border is scored, as it is supervised in training
    first = next(i for i, end in enumerate(ends) if end > start and not specials[i])
    last = next(i for i in reversed(range(len(ends))) if not specials[i])
    kept = min(last + 1, lm.positions)
    text = whole_text[start : ends[kept - 1]] if kept <= last else reference.text
    return _Encoded(tokens["input_ids"][:kept], first, len(text.encode()), kept == last + 1)


def _batches(lengths: Sequence[int]) -> list[list[int]]:
    """Numbers of rows in batches of similar lengths, the longest first."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= BATCH_TOKENS:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def _score_batch(lm: GenerationModel, rows: list[_Encoded]) -> list[float]:
    """Nats of each row, by one forward; without rows it only serves the ranks that have some."""
    filler = min(lm.eos_ids)
    # Padding on the right needs no mask in a causal model.
    input_ids = torch.full((max(1, len(rows)), max((len(row.input_ids) for row in rows), default=1)), filler)
    for place, row in enumerate(rows):
        input_ids[place, : len(row.input_ids)] = torch.tensor(row.input_ids)
    input_ids = input_ids.to(lm.device)
    with torch.no_grad():
        logits = lm.model(input_ids=input_ids, use_cache=False).logits
    return [
        _nats(logits[place, row.first - 1 : len(row.input_ids) - 1], input_ids[place, row.first : len(row.input_ids)])
        for place, row in enumerate(rows)
    ]


def _nats(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """Summed cross-entropy in float64 of `targets` [tokens] under `logits` [tokens, vocabulary]."""
    pairs = zip(logits.split(CHUNK_POSITIONS), targets.split(CHUNK_POSITIONS), strict=True)
    return sum(
        torch.nn.functional.cross_entropy(chunk.double(), target, reduction="sum").item() for chunk, target in pairs
    )
