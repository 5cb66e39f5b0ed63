"""The likelihood of references: no sampling and, in bits per byte, no dependence on the tokenizer.

The tokens of the reference are scored, not those of the prompt and not the eos. They are those of training, where
prompt and answer are tokenised as one text. The batches depend on the references alone and not on the number of
processes, so the sums are the same everywhere.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from isotune.evaluation.distributed_eval import Ranks
from isotune.evaluation.generation.completion import own_batches
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
    costs = [sum(len(encoded[i].input_ids) for i in batch) for batch in batches]
    own: dict[int, Likelihood] = {}
    for batch in own_batches(lm, batches, costs, ranks):
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
    tokens = [torch.tensor(row.input_ids) for row in rows] or [torch.tensor([filler])]
    # Padding on the right needs no mask in a causal model.
    input_ids = pad_sequence(tokens, batch_first=True, padding_value=filler).to(lm.device)
    with torch.no_grad():
        logits = lm.model(input_ids=input_ids, use_cache=False).logits
    nats = []
    for row, ids, scores in zip(rows, input_ids, logits, strict=False):
        end = len(row.input_ids)
        chunks = scores[row.first - 1 : end - 1].split(CHUNK_POSITIONS), ids[row.first : end].split(CHUNK_POSITIONS)
        nats.append(sum(cross_entropy(c.double(), t, reduction="sum").item() for c, t in zip(*chunks, strict=True)))
    return nats
