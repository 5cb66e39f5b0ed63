"""Arguments under which a result would depend on the launch, or which have no meaning in a schedule."""

from typing import Any

import torch
from torch import nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from isotune.compat.peft import base_model_of
from isotune.drop_in.fields import FIELDS, REFUSED
from isotune.io.errors import UserError
from isotune.training.gradients.exact_support import UpdateSetting, check_exact

REFUSED_STRATEGIES = {
    "wrapped": "rows see each other: say bfd",
    "bfd_split": "rows would be cut off at max_length and not be split: split them in the dataset, and say bfd",
}
OWN_LOOP = ("schedule_free", "lomo", "adalomo")  # optimizers
LAYERWISE = "_layerwise"  # ones whose hooks update a parameter in the backward of a microbatch, and let its gradient go
OF_LIBRARY_STEP = ("mean_token_accuracy", "entropy", "num_tokens", "aux_loss")
# methods by which a subclass would decide what an update, or an evaluation, sees
OF_UPDATES = ("get_train_dataloader", "_get_train_sampler", "get_batch_samples", "_get_dataloader")
OF_EVALUATIONS = ("get_eval_dataloader", "get_test_dataloader", "_get_eval_sampler")


def refuse_overrides(kind: type, base: type) -> None:
    """Stop for a subclass whose own methods would not be called, or would decide what an update sees."""
    for name in (*OF_UPDATES, *OF_EVALUATIONS):
        if getattr(kind, name, None) is not getattr(base, name, None):
            what = "an update" if name in OF_UPDATES else "an evaluation"
            raise UserError(f"{kind.__name__}.{name} decides what {what} sees, which the schedule does: take it out")


def refuse(args: Any, options: dict[str, Any]) -> None:
    """Stop where the result would depend on the launch, or an argument has no meaning in a schedule."""
    for name, verdict in FIELDS.items():
        given = getattr(args, name, None)
        if verdict.here == REFUSED and (bool(given) if verdict.value is True else given == verdict.value):
            raise UserError(f"{name}: {given}: {verdict.note}")
    strategy = getattr(args, "packing_strategy", "")
    if strategy in REFUSED_STRATEGIES and (args.packing or args.eval_packing):
        raise UserError(f"packing_strategy: {strategy}: {REFUSED_STRATEGIES[strategy]}")
    if getattr(args, "packing", False) and getattr(args, "max_length", None) is None:
        raise UserError("packing needs max_length")
    name = str(getattr(args, "optim", "")).removeprefix("OptimizerNames.").lower()
    if name.startswith(OWN_LOOP):
        raise UserError(f"optim: {name}: it needs a training loop that calls it")
    if name.endswith(LAYERWISE):
        raise UserError(
            f"optim: {name}: it updates in the backward of each microbatch, and an update has several: say "
            f"{name.removesuffix(LAYERWISE)}"
        )
    if str(getattr(args, "metric_for_best_model", None)).removeprefix("eval_") in OF_LIBRARY_STEP:
        raise UserError("metric_for_best_model: TRL computes it in its own step: say eval_loss or one of your own")
    if "loss" in (getattr(args, "include_for_metrics", None) or ()):
        raise UserError("include_for_metrics: loss: there is one loss of all rows, eval_loss, and none of a batch")
    if getattr(options.get("data_collator"), "mlm", False):
        raise UserError("masked language modelling draws its masks in the collator, where no schedule sees them")
    model = options.get("model")
    for adapter in (options.get("peft_config"), *dict(getattr(model, "peft_config", {})).values()):
        if getattr(adapter, "is_prompt_learning", False):
            kind = type(adapter).__name__
            raise UserError(f"{kind}: virtual tokens stand before padded rows, and nothing is padded: say LoraConfig")
    if isinstance(model, nn.Module):
        check_model(model)
        if getattr(model, "is_distributed_loading_by_transformers", False):
            raise UserError(
                "the model is split over the processes as it was loaded, and every process has documents of its own: "
                "load it whole, and let FSDP2 or ZeRO shard it"
            )


def refuse_engine(trainer: Any) -> None:
    """Stop for an engine whose sums of gradients nobody has looked at."""
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)  # without FSDP the state has none
    if plugin is not None and plugin.fsdp_version != 2:
        raise UserError(f"FSDP of version {plugin.fsdp_version}: say fsdp_version: 2, as fsdp_config does by itself")


def check_model(model: nn.Module) -> None:
    """Stop for what is neither a causal language model nor a sequence classifier."""
    kind = type(base_model_of(model)).__name__
    known = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(), *MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values()}
    if kind not in known and not kind.endswith(("ForCausalLM", "LMHeadModel", "ForSequenceClassification")):
        raise UserError(f"{kind} is neither a causal language model nor a sequence classifier: use the library's own")


def uses_exact_gradients(trainer: Any, asked: bool | str, *, few_trained: bool) -> bool:
    """Whether a trainer sums gradients as integers: `auto` does where few are trained, under plain and DDP.

    UserError where they are asked for and cannot be kept.
    """
    setting = update_setting(trainer)
    if asked == "auto":
        return few_trained and not setting.shards and setting.holds_integers
    if asked:
        check_exact(setting)
    return bool(asked)


def update_setting(trainer: Any) -> UpdateSetting:
    """What the bits of a trainer's updates depend on; an optimizer of its user is known by its class."""
    args, own = trainer.args, trainer.optimizer
    plugin = trainer.accelerator.state.deepspeed_plugin if trainer.is_deepspeed_enabled else None
    config = None if plugin is None else plugin.deepspeed_config
    optimizer = str(getattr(args.optim, "value", args.optim))
    if own is not None:
        kept = {torch.optim.AdamW: "adamw_torch", torch.optim.SGD: "sgd"}.get(type(own))
        optimizer = kept if kept and not own.defaults.get("fused") else f"your {type(own).__name__}"
    elif trainer.optimizer_cls_and_kwargs is not None:
        optimizer = f"your {trainer.optimizer_cls_and_kwargs[0].__name__}"
    elif config is not None and "optimizer" in config:
        optimizer = "the optimizer of the DeepSpeed configuration"
    precision = str(trainer.accelerator.mixed_precision)
    return UpdateSetting(args.device.type, optimizer, precision, trainer.is_fsdp_enabled, config)
