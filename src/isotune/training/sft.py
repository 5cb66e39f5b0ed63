"""The parts of an instruction-tuning run, each built by one function that the launch script calls in order."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from isotune.checkpoint.final_model import FinalModelReport, save_and_verify
from isotune.checkpoint.unshard import plain_model
from isotune.config import Recipe, RunRecipe
from isotune.data.batch_schedule import StepSchedule
from isotune.data.run_data import RunData
from isotune.distributed.launch import Process
from isotune.io.errors import UserError
from isotune.models.cpu.speedups import enable_speedups
from isotune.models.lora import add_adapters
from isotune.models.opening import is_made_here, load_base_model, load_config, load_whole_models
from isotune.models.packed_attention import set_packed_attention
from isotune.models.supervised_loss import install_supervised_loss
from isotune.run.run_dir import RunDir
from isotune.training.arguments import training_arguments
from isotune.training.callbacks.pre_train_checks import PreTrainChecks
from isotune.training.trainer import PlanTrainer

# torch 2.13's fused AdamW rounds the last few numbers of a tensor otherwise on CPU (44 of 14,000 in ten steps, on
# tensors of 7), 8-bit optimisers quantise blocks, Adafactor factors matrices: to them a share is another tensor.
POSITION_FREE_OPTIMISERS = ("adamw_torch", "sgd")


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
    kind: type[PlanTrainer] = PlanTrainer,
) -> PlanTrainer:
    """The plan, and the trainer that carries it out; checks run when training begins."""
    run.check_room(saved_bytes(model))
    plan = StepSchedule(
        data.train.documents,
        data.train.rows,
        global_batch_size=recipe.global_batch_size,
        microbatch_tokens=recipe.microbatch_tokens or recipe.max_seq_length,
        seed=recipe.seed,
    )
    eval_plan = data.evaluation and StepSchedule(
        data.evaluation.documents,
        data.evaluation.rows,
        global_batch_size=len(data.evaluation.rows),
        microbatch_tokens=recipe.eval_microbatch_tokens or plan.microbatch_tokens,
        seed=recipe.seed,
        shuffle=False,
    )
    roles = {role: found for role, found in (("train", data.train), ("evaluation", data.evaluation)) if found}
    start_up = PreTrainChecks(
        run,
        {role: found.fingerprint for role, found in roles.items()},
        {role: found.table.as_dict() for role, found in roles.items()},
    )
    trainer = kind(
        model=model,
        args=training_arguments(recipe, process),
        recipe=recipe,
        process=process,
        plan=plan,
        train=data.train,
        eval_plan=eval_plan,
        evaluation=data.evaluation,
        exact=uses_exact_gradients(recipe, process),
        tokenizer=tokenizer,
        start_up=start_up,
    )
    start_up.trainer = trainer
    return trainer


def uses_exact_gradients(recipe: RunRecipe, process: Process) -> bool:
    """`auto` is on where few parameters are trained, under plain and DDP; ZeRO-1 and 2 in fp32 are asked for it.

    Raises:
        UserError: asked for under an engine that cannot keep it.
    """
    if recipe.exact_gradients is True and (process.fsdp or process.zero_stage in (0, 3)):
        engine = "FSDP" if process.fsdp else f"ZeRO-{process.zero_stage}"
        raise UserError(f"exact_gradients: true cannot hold under {engine}: use DDP, ZeRO-1 or ZeRO-2")
    if recipe.exact_gradients is True and process.deepspeed and (recipe.bf16 or recipe.fp16):
        raise UserError(
            "exact_gradients: true cannot hold under DeepSpeed in 16 bits, which rounds gradients itself: use DDP"
        )
    optimiser = recipe.training_arguments["optim"]
    if recipe.exact_gradients is True and process.deepspeed and optimiser not in POSITION_FREE_OPTIMISERS:
        raise UserError(
            f"exact_gradients: true under ZeRO needs optim: {' or '.join(POSITION_FREE_OPTIMISERS)}, because "
            f"{optimiser} rounds a number by where it lies in a share: say so on every number of processes"
        )
    return recipe.sums_exactly(plain_or_ddp=not (process.deepspeed or process.fsdp))


def saved_bytes(model: nn.Module) -> int:
    """What the trained tensors take on disk."""
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def load_base_again(recipe: RunRecipe) -> PreTrainedModel:
    """The base model of a recipe as training began with it."""
    return load_base_model(recipe, load_config(recipe), torch.device("cpu"))


def save(
    recipe: RunRecipe,
    run: RunDir,
    trainer: PlanTrainer,
    tokenizer: Any,
    load_again: Callable[[Any], PreTrainedModel] = load_base_again,
) -> FinalModelReport | None:
    """Write RUN/model on the main process, reopened and compared before it is called saved; every rank must call it.

    The base of an adapter that exists nowhere else, because it was made at random, is written beside it: `load_again`
    makes it from the recipe.
    """
    trainer.accelerator.wait_for_everyone()
    trainer.watchdog.stop()
    run.lease.check()
    report = None
    inner: Any = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    model: Any = plain_model(inner, keep=trainer.process.is_main)
    load_whole_models()  # to be reopened, and to answer the sample question
    if model is not None:
        if recipe.tune != "full" and is_made_here(recipe):
            save_and_verify(load_again(recipe), tokenizer, run.base_model)
            model.peft_config["default"].base_model_name_or_path = str(run.base_model.resolve())
        report = save_and_verify(model, tokenizer, run.model)
        if trainer.metrics_file is not None:
            trainer.metrics_file.close()
    trainer.accelerator.wait_for_everyone()
    return report
