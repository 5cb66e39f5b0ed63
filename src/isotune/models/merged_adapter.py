"""Merging an adapter into its base, and measuring how far the logits move."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from isotune.data.sft.conversations import render_prompt
from isotune.io.errors import UserError, first_line
from isotune.models.log_control import quiet_libraries
from isotune.models.opening import FinishedRun, add_run_adapter, load_run_base, load_run_tokenizer

# Relative to the largest logit. Merging rounds in fp32; the merged weights are then rounded to the dtype of the file,
# which moves logits by a few times the precision of that dtype (2^-23, 2^-10 and 2^-7).
PARITY_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
PROBE_QUESTION = "How do I boil an egg so that the yolk stays soft, and how long does it take?"
PROBE_ANSWER = (
    " Bring a pan of water to a gentle boil, lower the egg into it with a spoon and leave it there for six minutes. "
    "Then cool it under running water: otherwise it goes on cooking in its shell. Large eggs need a minute more."
)
PROBE_TOKENS = 64


@dataclass(frozen=True)
class Parity:
    """How far merging moves the logits of a fixed input, with both models in fp32.

    Attributes:
        largest_difference: largest absolute difference of a logit.
        largest_logit: largest absolute logit of the adapter model.
        tolerance: upper bound of `largest_difference` for the dtype of the file.
    """

    largest_difference: float
    largest_logit: float
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether the difference is within the tolerance; false for NaN."""
        return self.largest_difference <= self.tolerance

    def __str__(self) -> str:
        return (
            f"parity: largest absolute logit difference {self.largest_difference:.3g} "
            f"(tolerance {self.tolerance:.3g}, largest logit {self.largest_logit:.3g})"
        )


@dataclass(frozen=True)
class MergedModel:
    """A merged model, its tokenizer, and the measured difference from the adapter on its base."""

    model: Any
    tokenizer: Any
    parity: Parity


def merge_run(run: FinishedRun, dtype: torch.dtype | None = None) -> MergedModel:
    """Merge a run's adapter into its base: W + scale * B @ A in fp32, rounded once to the dtype of the file.

    A base that was trained in 4 bits is dequantized and stays so: the adapter was trained on these values, and a 4-bit
    matrix plus a small update would be rounded back to the same 4 bits. Takes the memory of the model in fp32, and no
    GPU.

    Args:
        run: of an adapter.
        dtype: of the merged weights; None is that of the base in training.

    Raises:
        UserError: the base or the adapter cannot be loaded or has NaN, or the difference is beyond the tolerance.
    """
    assert run.is_adapter, "only an adapter can be merged"
    tokenizer = load_run_tokenizer(run)
    base = load_run_base(run, torch.device("cpu"), dequantize=True)
    file_dtype = dtype or base.dtype
    adapted = add_run_adapter(run, base.float()).eval()
    probe = probe_tokens(tokenizer, base.config.vocab_size)
    expected = probe_logits(adapted, probe)
    try:
        with quiet_libraries():
            merged = adapted.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise UserError(f"the adapter in {run.model} cannot be merged: {first_line(error)}") from error
    # through the dtype of the file and back, so that its rounding is measured too
    merged_logits = probe_logits(merged.to(file_dtype).float(), probe)
    merged = merged.to(file_dtype)
    parity = compare_logits(expected, merged_logits, PARITY_TOLERANCE.get(file_dtype, PARITY_TOLERANCE[torch.float32]))
    if not parity.holds:
        raise UserError(
            f"the merged model of {run.folder} is not the adapter model ({parity}), so nothing was written: "
            f"{'its weights are not finite' if expected.isnan().any() else 'try --dtype float32'}"
        )
    return MergedModel(merged, tokenizer, parity)


def probe_tokens(tokenizer: Any, vocabulary: int) -> Tensor:
    """The fixed input, int64 [2, 64]: a conversation as in training, and tokens from all over the vocabulary.

    The conversation is truncated or repeated to fill its row.
    """
    conversation = tokenizer(render_prompt(PROBE_QUESTION) + PROBE_ANSWER)["input_ids"]
    repeated = (conversation * (PROBE_TOKENS // len(conversation) + 1))[:PROBE_TOKENS]
    spread = [(i * vocabulary) // PROBE_TOKENS for i in range(PROBE_TOKENS)]
    return torch.tensor([repeated, spread])


def probe_logits(model: Any, probe: Tensor) -> Tensor:
    """Logits of the fixed input: float32 [2, tokens, vocabulary], or [2, classes] of a classifier, on the CPU."""
    positions = getattr(model.config, "max_position_embeddings", None) or probe.shape[1]
    tokens = probe[:, :positions].to(model.device)
    with torch.no_grad():
        return model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits.float().cpu()


def compare_logits(expected: Tensor, actual: Tensor, relative_tolerance: float) -> Parity:
    """The parity of two models' logits; the tolerance is relative to the largest expected logit."""
    largest = float(expected.abs().max())
    return Parity(float((expected - actual).abs().max()), largest, relative_tolerance * largest)
