"""Arguments under which a result would depend on the launch, or which have no meaning in a schedule."""

from typing import Any

import transformers
from torch import nn
from trl.trainer.sft_trainer import SFTTrainer as TrlSFTTrainer

from isotune.compat.peft import base_model_of
from isotune.io.errors import UserError

LIBRARY_LOSSES = (transformers.Trainer.compute_loss, TrlSFTTrainer.compute_loss)
# collators that only pad, which nothing here needs
PADDERS = {
    "DataCollatorWithPadding",
    "DataCollatorForLanguageModeling",
    "DataCollatorForSeq2Seq",
    "DefaultDataCollator",
}


def refuse(trainer: Any, args: Any, given: dict[str, Any]) -> None:
    """Stop where the result would depend on the launch, or an argument has no meaning in a schedule."""
    said = lambda name: getattr(args, name, None)  # noqa: E731  (args may be None, or not TRL's)
    collator, model = given.get("data_collator"), given.get("model")
    config = getattr(base_model_of(model), "config", None) if isinstance(model, nn.Module) else None
    own_collator = collator is not None and type(collator).__name__ not in PADDERS | {"function"}
    own_loss = type(trainer).compute_loss not in LIBRARY_LOSSES or given.get("compute_loss_func") is not None
    smooths_tokens = bool(said("label_smoothing_factor")) and isinstance(trainer, TrlSFTTrainer)
    problem = getattr(config, "problem_type", None)
    wrong = {
        "a loss of your own (compute_loss, compute_loss_func) is not computed over the global batch yet": own_loss,
        "a data_collator of your own decides what a batch is: prepare the rows in the dataset": own_collator,
        "masked language modelling draws its masks in the collator, where no schedule sees them": getattr(
            collator, "mlm", False
        ),
        "label_smoothing_factor has no chunked loss over tokens": smooths_tokens,
        f"loss_type: {said('loss_type')} is not computed over the global batch": said("loss_type") not in (None, "nll"),
        f"problem_type: {problem} is not computed over the global batch yet": problem
        not in (None, "single_label_classification"),
        "neftune_noise_alpha is scaled by a batch's padded length, and there is none": said("neftune_noise_alpha"),
        "auto_find_batch_size changes what a device holds: say microbatch_tokens": said("auto_find_batch_size"),
        "dataloader_drop_last: nothing is dropped, the last update of an epoch is smaller": said(
            "dataloader_drop_last"
        ),
        "model_init makes another model for each training, after the schedule is made: give model": given.get(
            "model_init"
        ),
        "packing_strategy: wrapped lets rows see each other: say bfd": said("packing")
        and said("packing_strategy") == "wrapped",
        "packing needs max_length": said("packing") and said("max_length") is None,
    }
    for sentence, is_wrong in wrong.items():
        if is_wrong:
            raise UserError(sentence)
