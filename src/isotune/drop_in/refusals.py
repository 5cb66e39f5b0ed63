"""Arguments under which a result would depend on the launch, or which have no meaning in a schedule."""

from typing import Any

from torch import nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from isotune.compat.peft import base_model_of
from isotune.io.errors import UserError

# an argument of TrainingArguments or SFTConfig, by the value that is refused: anything true, or one value
REFUSED_FIELDS: dict[str, tuple[Any, str]] = {
    "auto_find_batch_size": (True, "changes what a device holds: say microbatch_tokens"),
    "dataloader_drop_last": (True, "nothing is dropped, the last update of an epoch is smaller"),
    "batch_eval_metrics": (True, "metrics are computed once, of all predictions"),
    "packing_strategy": ("wrapped", "rows see each other: say bfd"),
}


def refuse(args: Any, given: dict[str, Any]) -> None:
    """Stop where the result would depend on the launch, or an argument has no meaning in a schedule."""
    for name, (value, reason) in REFUSED_FIELDS.items():
        if getattr(args, name, None) == value and (name != "packing_strategy" or getattr(args, "packing", False)):
            raise UserError(f"{name}: {value}: {reason}")
    if getattr(args, "packing", False) and getattr(args, "max_length", None) is None:
        raise UserError("packing needs max_length")
    if getattr(args, "router_aux_loss_coef", None):
        raise UserError("router_aux_loss_coef: the routers' balancing loss is a mean of microbatches: say 0.0")
    if "loss" in (getattr(args, "include_for_metrics", None) or ()):
        raise UserError("include_for_metrics: loss: there is one loss of all rows, eval_loss, and none of a batch")
    if getattr(given.get("data_collator"), "mlm", False):
        raise UserError("masked language modelling draws its masks in the collator, where no schedule sees them")
    if isinstance(model := given.get("model"), nn.Module):
        check_model(model)


def check_model(model: nn.Module) -> None:
    """Stop for what is neither a causal language model nor a sequence classifier."""
    kind = type(base_model_of(model)).__name__
    known = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(), *MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values()}
    if kind not in known and not kind.endswith(("ForCausalLM", "LMHeadModel", "ForSequenceClassification")):
        raise UserError(f"{kind} is neither a causal language model nor a sequence classifier: use the library's own")
