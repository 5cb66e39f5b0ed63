"""The recipe in the words of transformers' TrainingArguments."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import TrainingArguments, training_args

from isotune.config import RunRecipe
from isotune.config.engine_keys import HIGHER_IS_BETTER
from isotune.distributed.launch import Process


def training_arguments(recipe: RunRecipe, process: Process) -> TrainingArguments:
    """TrainingArguments for the plan: an item of the loader is a whole update, so batch and accumulation are 1.

    Must be made after `start_process`, whose state it takes over.
    """
    engine = dict(recipe.training_arguments)
    checkpointing = bool(engine.pop("gradient_checkpointing", False))
    load_best = engine.pop("load_best_model_at_end", False)
    with _bf16_without_a_gpu():
        arguments = _arguments(recipe, process, engine, checkpointing)
    # the library would insist on saving and evaluating at the same steps, but the best is saved whenever it comes
    arguments.load_best_model_at_end = load_best
    return arguments


@contextmanager
def _bf16_without_a_gpu() -> Iterator[None]:
    """transformers 5.23 refuses bf16 on a CPU unless `use_cpu` is said, which would drop DeepSpeed and FSDP."""
    library: Any = training_args
    asks = library.is_torch_bf16_gpu_available
    if not torch.cuda.is_available():
        library.is_torch_bf16_gpu_available = lambda: True
    try:
        yield
    finally:
        library.is_torch_bf16_gpu_available = asks


def _arguments(recipe: RunRecipe, process: Process, engine: dict[str, Any], checkpointing: bool) -> TrainingArguments:
    return TrainingArguments(
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
        # every parameter that is trained takes part in every pass
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=process.device.type == "cuda",
        # TF32 would make fp32 another number on other hardware
        tf32=False if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0) else None,
    )
