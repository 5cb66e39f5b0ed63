"""The loss that a model computes by itself: its `loss_function`, or what else its forward does with labels."""

from typing import Any

import torch
from torch import nn
from transformers.loss.loss_utils import LOSS_MAPPING

from isotune.compat.peft import base_model_of
from isotune.io.errors import UserError

TOLERANCE = 1e-3  # relative, of two losses of the same logits
TOLERANCE_16_BIT = 2e-2  # of losses that are rounded themselves


def has_other_loss(base: Any, *, causal: bool) -> bool:
    """Whether `model.loss_function` was set to another than the cross-entropy of this kind of model."""
    return base.loss_function is not LOSS_MAPPING["ForCausalLM" if causal else "ForSequenceClassification"]


def loss_of_logits(base: Any, logits: torch.Tensor, labels: torch.Tensor, items: Any, *, causal: bool) -> torch.Tensor:
    """What the `loss_function` of a model makes of logits [rows, ...], as the forward of its kind calls it."""
    options: dict[str, Any] = {"config": base.config, "pooled_logits": logits}
    if causal:
        options = {"vocab_size": logits.shape[-1], "num_items_in_batch": items}
    return base.loss_function(logits=logits, labels=labels, **options)


@torch.no_grad()
def check_model_loss(
    model: nn.Module, wrapped: nn.Module, input_ids: torch.Tensor, labels: torch.Tensor, *, causal: bool
) -> None:
    """UserError where the forward of a model makes another loss of `labels` than its loss_function.

    `wrapped` is what the engine runs. `input_ids` is [1, tokens], `labels` [1, tokens] or [1, ...] of a classifier. The
    routers' loss is left out.
    """
    base: Any = base_model_of(model)
    has_routers = causal and hasattr(base.config.get_text_config(), "output_router_logits")
    options = {"output_router_logits": False} if has_routers else {}
    was_training = wrapped.training
    wrapped.eval()
    try:
        outputs: Any = wrapped(input_ids=input_ids, labels=labels, **options)
    finally:
        wrapped.train(was_training)
    if outputs.loss is None:
        return
    own, expected = float(outputs.loss), float(loss_of_logits(base, outputs.logits, labels, None, causal=causal))
    tolerance = TOLERANCE_16_BIT if outputs.loss.dtype in (torch.bfloat16, torch.float16) else TOLERANCE
    if abs(own - expected) > tolerance * max(abs(own), abs(expected)):
        raise UserError(
            f"{type(base).__name__}.forward returns a loss ({own:.4g}) that its loss_function does not make of its "
            f"logits ({expected:.4g}), and the loss of an update is made of logits: give it as compute_loss_func"
        )
