"""What a recipe asks of transformers' and TRL's trainers, and whether its gradients can be summed exactly."""

from typing import Any

import torch
from transformers import TrainingArguments
from trl.trainer.sft_config import SFTConfig

from isotune.compat.transformers import bf16_without_gpu, use_one_gpu
from isotune.config import RunRecipe
from isotune.config.task_types import HIGHER_IS_BETTER
from isotune.distributed.launch import Process
from isotune.training.gradients.exact_support import UpdateSetting, check_exact


def sft_arguments(recipe: RunRecipe, process: Process) -> TrainingArguments:
    """`training_arguments` for SFTTrainer, which is told that rows, packing, targets and loss are ours."""
    ours = {"max_length": recipe.max_seq_length, "packing": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
    ours |= {"router_aux_loss_coef": 0.0}  # a mean of microbatches; PlannedTraining says that it is left out
    arguments = training_arguments(recipe, process, SFTConfig, **ours)
    # TRL reads the old name of activation_checkpointing, and would then use the reentrant kind under ZeRO-3 and make
    # the embedding's output require a gradient, which non-reentrant checkpointing does not need
    arguments.gradient_checkpointing = False
    return arguments


def training_arguments(
    recipe: RunRecipe, process: Process, kind: type[TrainingArguments] = TrainingArguments, **more: Any
) -> TrainingArguments:
    """TrainingArguments for a schedule: an item of the loader is a whole update, so batch and accumulation are 1.

    Must be made after `start_process`, whose state it takes over.
    """
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
            # where a microbatch may leave a parameter without a gradient, DDP's own sum is not used
            ddp_find_unused_parameters=False,
            dataloader_pin_memory=process.device.type == "cuda",
            # TF32 would make fp32 another number on other hardware
            tf32=False if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0) else None,
            **more,
        )
    # the library would insist on saving and evaluating at the same steps, but the best is saved whenever it comes
    arguments.load_best_model_at_end = load_best
    use_one_gpu(arguments)
    return arguments


def uses_exact_gradients(recipe: RunRecipe, process: Process) -> bool:
    """`auto` is on where few parameters are trained, under plain and DDP; an engine that shards is asked for it.

    Raises UserError where it is asked for and cannot be kept.
    """
    config, optimizer = process.deepspeed_config, recipe.training_arguments["optim"]
    setting = UpdateSetting(process.device.type, optimizer, recipe.mixed_precision, process.fsdp, config)
    if recipe.exact_gradients is True:
        check_exact(setting)
    return recipe.sums_exactly(plain_or_ddp=not setting.shards) and setting.holds_integers
