"""How likely the model finds the reference: a measure that needs no sampling and, in bits a byte, no common tokenizer.

What is scored is the reference after its prompt and nothing else: not the prompt, not the eos. The tokens are those of
training, where prompt and answer are tokenised as one text. The passes depend on the references alone and not on the
number of processes, so the same numbers are summed everywhere.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from isotune.evaluation.distributed_eval import Ranks
from isotune.evaluation.generation.batched_generation import GenerationModel, own_share
from isotune.io.errors import UserError

PASS_TOKENS = 2048  # of one forward pass, padding included; a longer row runs alone
POSITIONS_AT_ONCE = 256  # whose scores over the vocabulary lie in float64 together


@dataclass(frozen=True)
class Reference:
    """A text that should follow another; `row` names it."""

    row: int
    prompt: str
    text: str


@dataclass(frozen=True)
class Likelihood:
    """The negative logarithm of the probability of a reference after its prompt.

    Attributes:
        nll: nats, summed over its tokens.
        tokens: that were scored.
        bytes: of the text that those stand for, in UTF-8.
        whole: the model had positions for all of it; else the rest counts nowhere.
    """

    nll: float
    tokens: int
    bytes: int
    whole: bool

    @property
    def perplexity(self) -> float:
        """A token."""
        return math.exp(self.nll / self.tokens)

    @property
    def bits_per_byte(self) -> float:
        """Bits that a byte of the text costs when it is coded with this model."""
        return self.nll / self.bytes / math.log(2)


def score_references(
    speaker: GenerationModel, references: Sequence[Reference], ranks: Ranks | None = None
) -> dict[int, Likelihood]:
    """The likelihood of each reference by its row; with `ranks` each process scores its share and gets them all.

    Raises:
        UserError: the tokenizer gives no character offsets, or the model's scores are not finite.
    """
    encoded = [_encode(speaker, reference) for reference in references]
    passes = _passes([len(one.input_ids) for one in encoded])
    mine, rounds = own_share(speaker, [sum(len(encoded[i].input_ids) for i in some) for some in passes], ranks)
    found: dict[int, Likelihood] = {}
    for number in range(rounds):
        rows = passes[mine[number]] if number < len(mine) else []
        for i, nll in zip(rows, _score_pass(speaker, [encoded[i] for i in rows]), strict=True):
            one = encoded[i]
            found[references[i].row] = Likelihood(nll, len(one.input_ids) - one.first, one.bytes, one.whole)
    whole = ranks.gather(found) if ranks else found
    broken = sorted(row for row, one in whole.items() if not math.isfinite(one.nll))
    if broken:
        raise UserError(
            f"the model's scores are not finite for {len(broken)} of {len(whole)} references, row {broken[0] + 1} "
            "first: its weights are broken, or its precision is too small for them"
        )
    return whole


@dataclass(frozen=True)
class _Encoded:
    """A prompt with its reference; the tokens from `first` on are scored."""

    input_ids: list[int]
    first: int
    bytes: int
    whole: bool


def _encode(speaker: GenerationModel, reference: Reference) -> _Encoded:
    whole_text = reference.prompt + reference.text
    try:
        tokens = speaker.tokenizer(whole_text, return_offsets_mapping=True, return_special_tokens_mask=True)
    except NotImplementedError:
        name = speaker.tokenizer.name_or_path
        raise UserError(
            f"the tokenizer {name} gives no character offsets: save its fast form, tokenizer.json"
        ) from None
    start = len(reference.prompt)
    ends = [end for _, end in tokens["offset_mapping"]]
    specials = tokens["special_tokens_mask"]
    # a token that straddles the border is scored, as it is supervised in training
    first = next(i for i, end in enumerate(ends) if end > start and not specials[i])
    last = next(i for i in reversed(range(len(ends))) if not specials[i])
    kept = min(last + 1, speaker.positions)
    text = whole_text[start : ends[kept - 1]] if kept <= last else reference.text
    return _Encoded(tokens["input_ids"][:kept], first, len(text.encode()), kept == last + 1)


def _passes(lengths: Sequence[int]) -> list[list[int]]:
    """Numbers of rows in passes of about one length, the longest first."""
    passes: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if passes and (len(passes[-1]) + 1) * lengths[passes[-1][0]] <= PASS_TOKENS:
            passes[-1].append(i)
        else:
            passes.append([i])
    return passes


def _score_pass(speaker: GenerationModel, rows: list[_Encoded]) -> list[float]:
    """Nats of each row, by one forward pass; without rows only for the sake of the ranks that have some."""
    filler = min(speaker.eos_ids)
    # Padding on the right needs no mask: a causal model never looks ahead.
    input_ids = torch.full((max(1, len(rows)), max((len(row.input_ids) for row in rows), default=1)), filler)
    for place, row in enumerate(rows):
        input_ids[place, : len(row.input_ids)] = torch.tensor(row.input_ids)
    input_ids = input_ids.to(speaker.device)
    with torch.no_grad():
        logits = speaker.model(input_ids=input_ids, use_cache=False).logits
    return [
        _nats(logits[place, row.first - 1 : len(row.input_ids) - 1], input_ids[place, row.first : len(row.input_ids)])
        for place, row in enumerate(rows)
    ]


def _nats(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """Summed cross-entropy in float64 of `targets` [tokens] under `logits` [tokens, vocabulary]."""
    pairs = zip(logits.split(POSITIONS_AT_ONCE), targets.split(POSITIONS_AT_ONCE), strict=True)
    return sum(
        torch.nn.functional.cross_entropy(some.double(), wanted, reduction="sum").item() for some, wanted in pairs
    )
