"""Which models leave a parameter without a gradient, measured before the first update.

Some have parameters for other tasks or languages, some leave out layers at random (layerdrop). Under plain PyTorch the
optimizer leaves such a parameter alone, and so it does here under every engine. DDP's own sum, which begins within the
last backward, would wait for it. DeepSpeed gives it zeros, with which the optimizer steps.
"""

import contextlib
from typing import Any, cast

import torch
from torch import nn

from isotune.compat.peft import base_model_of
from isotune.io.errors import UserError
from isotune.models.document_dropout import training_microbatch
from isotune.models.document_keys import MicrobatchDocuments
from isotune.models.isolation import LENGTHS, packed_inputs, random_documents
from isotune.models.layouts.layout import restore_attention_type
from isotune.training.tasks import Task


def leaves_out_layers(model: nn.Module) -> bool:
    """Whether the model leaves out layers of an update at random."""
    return any(bool(getattr(module, "layerdrop", 0)) for module in model.modules())


def refuse_left_out_layers(model: nn.Module) -> None:
    """UserError for DeepSpeed, under which the optimizer would step on a layer that an update left out."""
    if leaves_out_layers(model):
        raise UserError(
            "layerdrop: DeepSpeed gives a layer that an update leaves out a gradient of zeros, and other engines none: "
            "set it to 0 in the model's config.json, or use DDP or FSDP2"
        )


def leaves_gaps(model: Any, task: Task, device: torch.device) -> bool:
    """Whether a microbatch of `model`, as the engine has prepared it, leaves a parameter without a gradient.

    A few random documents run forward and backward, without communication; nothing is left behind. The same on every
    rank.
    """
    if leaves_out_layers(model):
        return True
    vocabulary = base_model_of(cast(nn.Module, getattr(model, "module", model))).config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    documents = random_documents(vocabulary, LENGTHS, generator)
    mode, silent = model.training, getattr(model, "no_sync", contextlib.nullcontext)
    model.train()
    torch.manual_seed(0)  # of dropout
    try:
        with silent(), training_microbatch(MicrobatchDocuments(range(len(LENGTHS)), LENGTHS, task.pads)):
            logits = model(**packed_inputs(documents, device, positions=task.item == "rows")).logits
            logits.float().sum().backward()
        return any(p.grad is None for p in model.parameters() if p.requires_grad)
    finally:
        model.zero_grad()
        model.train(mode)
        restore_attention_type(model)
