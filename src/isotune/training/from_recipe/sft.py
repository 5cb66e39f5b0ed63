"""The parts of an instruction-tuning run, each built by one function that the launch script calls in order."""

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from isotune.config import Recipe, RunRecipe
from isotune.data.documents import RunData
from isotune.distributed.launch import Process
from isotune.models.cpu.layers import enable_speedups
from isotune.models.lora import add_adapters
from isotune.models.opening import load_base_model
from isotune.models.packed_attention import set_packed_attention
from isotune.models.supervised_loss import install_supervised_loss
from isotune.run.run_dir import RunDir
from isotune.training.from_recipe.assembly import build
from isotune.training.tasks import SftTask
from isotune.training.trainer import PlannedTraining, SFTTrainer


def build_model(recipe: Recipe, config: PreTrainedConfig, device: torch.device) -> nn.Module:
    """The model ready for packed training: attention, loss head and adapters in place.

    Built from the seed alone, so every rank has the same weights before any communication.
    """
    base = load_base_model(recipe, config, device)
    set_packed_attention(base)
    install_supervised_loss(base)
    model = base if recipe.tune == "full" else add_adapters(base, recipe)
    enable_speedups(model)
    return model


def build_trainer(
    recipe: RunRecipe,
    process: Process,
    run: RunDir,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    data: RunData,
) -> PlannedTraining:
    """The schedule, and the SFTTrainer that carries it out; checks run when training begins."""
    return build(SFTTrainer, recipe, process, run, model, tokenizer, data, SftTask())
