"""The recipe in the words of transformers' TrainingArguments and TRL's SFTConfig."""

from typing import Any, TypeVar

import torch
from transformers import TrainingArguments
from trl.trainer.sft_config import SFTConfig

from isotune.compat.transformers import bf16_without_gpu
from isotune.config import RunRecipe
from isotune.config.engine_keys import HIGHER_IS_BETTER
from isotune.distributed.launch import Process

Arguments = TypeVar("Arguments", bound=TrainingArguments)


def training_arguments(recipe: RunRecipe, process: Process) -> TrainingArguments:
    """TrainingArguments for a schedule: an item of the loader is a whole update, so batch and accumulation are 1.

    Must be made after `start_process`, whose state it takes over.
    """
    return _arguments(TrainingArguments, recipe, process)


def sft_arguments(recipe: RunRecipe, process: Process) -> SFTConfig:
    """The same for SFTTrainer, which is told that rows, packing, targets and loss are ours."""
    ours = {"max_length": recipe.max_seq_length, "packing": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
    arguments = _arguments(SFTConfig, recipe, process, **ours)
    # TRL reads the old name of activation_checkpointing, and would then use the reentrant kind under ZeRO-3 and make
    # the embedding's output require a gradient, which non-reentrant checkpointing does not need
    arguments.gradient_checkpointing = False
    return arguments


def _arguments(kind: type[Arguments], recipe: RunRecipe, process: Process, **more: Any) -> Arguments:
    engine = dict(recipe.training_arguments)
    checkpointing = bool(engine.pop("gradient_checkpointing", False))
    load_best = engine.pop("load_best_model_at_end", False)
    with bf16_without_gpu():
        arguments = kind(
            **engine,
            # the engine's new name for the same; non-reentrant, as LoRA has no gradient at the model's input
            activation_checkpointing=checkpointing,
            activation_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
            output_dir=recipe.output_dir,
            max_steps=recipe.max_steps,
            num_train_epochs=recipe.num_train_epochs,
            seed=recipe.seed,
            bf16=recipe.bf16,
            fp16=recipe.fp16,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=1,
            use_cpu=process.use_cpu,
            accelerator_config={"use_configured_state": True},
            deepspeed=process.deepspeed_config,
            # the library would take eval_perplexity, whose name does not end in loss, for better where it is higher
            greater_is_better=engine.get("metric_for_best_model") in HIGHER_IS_BETTER,
            logging_nan_inf_filter=False,
            remove_unused_columns=False,
            # every parameter that is trained takes part in every microbatch
            ddp_find_unused_parameters=False,
            dataloader_pin_memory=process.device.type == "cuda",
            # TF32 would make fp32 another number on other hardware
            tf32=False if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0) else None,
            **more,
        )
    # the library would insist on saving and evaluating at the same steps, but the best is saved whenever it comes
    arguments.load_best_model_at_end = load_best
    return arguments
