"""An adapter merged into its base, and the measurement that says how far the merged model is from the adapter's."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from isotune.data.sft.conversations import render_prompt
from isotune.data.sources.hub import first_line
from isotune.io.errors import UserError
from isotune.models.finished_classifier import load_base_of
from isotune.models.finished_run import FinishedRun, add_run_adapter, load_run_tokenizer
from isotune.models.log_control import quiet_libraries

# Of the largest logit. Merging itself rounds in fp32; the merged weights are then rounded to the dtype they are
# written in, which moves logits by a few times that dtype's own precision (2^-23, 2^-10 and 2^-7).
PARITY_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
PROBE_QUESTION = "How do I boil an egg so that the yolk stays soft, and how long does it take?"
PROBE_ANSWER = (
    " Bring a pan of water to a gentle boil, lower the egg into it with a spoon and leave it there for six minutes. "
    "Then cool it under running water: otherwise it goes on cooking in its shell. Large eggs need a minute more."
)
PROBE_TOKENS = 64


@dataclass(frozen=True)
class Parity:
    """How far merging moved the logits of a fixed probe, both models computing in fp32.

    Attributes:
        largest_difference: largest absolute difference of a logit.
        largest_logit: largest absolute logit of the adapter model.
        tolerance: what `largest_difference` may be, stated for the dtype that is written.
    """

    largest_difference: float
    largest_logit: float
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether the merged model stands for the adapter model; never so with NaN."""
        return self.largest_difference <= self.tolerance

    def __str__(self) -> str:
        return (
            f"parity: largest absolute logit difference {self.largest_difference:.3g} "
            f"(tolerance {self.tolerance:.3g}, largest logit {self.largest_logit:.3g})"
        )


@dataclass(frozen=True)
class MergedModel:
    """A stock model that answers or classifies as the adapter on its base does, its tokenizer, and the proof."""

    model: Any
    tokenizer: Any
    parity: Parity


def merge_run(run: FinishedRun, dtype: torch.dtype | None = None) -> MergedModel:
    """Merge a run's adapter into its base: W + scale * B @ A in fp32, rounded once to the dtype to be written.

    A base that was trained in 4 bits is dequantised first and stays so: its numbers are those that the adapter was
    trained on, and a 4-bit matrix plus a small update would be rounded back to the same 4 bits. This takes the memory
    of the model in fp32, and no GPU.

    Args:
        run: of an adapter.
        dtype: of the merged weights; None is the one that the base was trained in.

    Raises:
        UserError: the base or the adapter cannot be loaded, holds NaN, or the merged model is beyond the tolerance.
    """
    assert run.is_adapter, "only an adapter can be merged"
    tokenizer = load_run_tokenizer(run)
    base = load_base_of(run, torch.device("cpu"), dequantised=True)
    written = dtype or base.dtype
    adapted = add_run_adapter(run, base.float()).eval()
    probe = probe_tokens(tokenizer, base.config.vocab_size)
    wanted = probe_logits(adapted, probe)
    try:
        with quiet_libraries():
            merged = adapted.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise UserError(f"the adapter in {run.model} cannot be merged: {first_line(error)}") from error
    # Through the written dtype and back: the probe sees the rounding that the file has.
    found = probe_logits(merged.to(written).float(), probe)
    merged = merged.to(written)
    parity = compare_logits(wanted, found, PARITY_TOLERANCE.get(written, PARITY_TOLERANCE[torch.float32]))
    if not parity.holds:
        raise UserError(
            f"the merged model of {run.folder} is not the adapter model ({parity}), so nothing was written: "
            f"{'its weights are not finite' if wanted.isnan().any() else 'try --dtype float32'}"
        )
    return MergedModel(merged, tokenizer, parity)


def probe_tokens(tokenizer: Any, vocabulary: int) -> Tensor:
    """The fixed probe, int64 [2, 64]: a conversation as in training, and tokens from all over the vocabulary.

    The conversation is cut, or begun again, to fill its row.
    """
    conversation = tokenizer(render_prompt(PROBE_QUESTION) + PROBE_ANSWER)["input_ids"]
    repeated = (conversation * (PROBE_TOKENS // len(conversation) + 1))[:PROBE_TOKENS]
    spread = [(number * vocabulary) // PROBE_TOKENS for number in range(PROBE_TOKENS)]
    return torch.tensor([repeated, spread])


def probe_logits(model: Any, probe: Tensor) -> Tensor:
    """The logits of the probe: float32 [2, tokens, vocabulary], or [2, classes], on the CPU."""
    positions = getattr(model.config, "max_position_embeddings", None) or probe.shape[1]
    tokens = probe[:, :positions].to(model.device)
    with torch.no_grad():
        return model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits.float().cpu()


def compare_logits(wanted: Tensor, found: Tensor, share: float) -> Parity:
    """The parity of two models' logits, with a tolerance of `share` of the largest wanted logit."""
    largest = float(wanted.abs().max())
    return Parity(float((wanted - found).abs().max()), largest, share * largest)
