"""From a recipe, a model and its data to a trainer with all its parts, whatever the task; and its final model."""

from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainingArguments
from trl.trainer.sft_config import SFTConfig

from isotune.checkpoint.final_model import FinalModelReport, save_and_verify
from isotune.checkpoint.unshard import plain_model
from isotune.compat.deepspeed import load_whole_models
from isotune.compat.transformers import bf16_without_gpu
from isotune.config import ClassificationRecipe, RunRecipe
from isotune.config.engine_keys import HIGHER_IS_BETTER
from isotune.data.batch_schedule import Step, StepSchedule
from isotune.data.documents import RunData
from isotune.distributed.launch import Process
from isotune.io.errors import UserError
from isotune.models.opening import is_made_here, load_base_model, load_config
from isotune.run.run_dir import RunDir
from isotune.training.callbacks import EarlyStop, PreTrainChecks
from isotune.training.checkpointer import Checkpointer
from isotune.training.nonfinite import NonFinitePolicy
from isotune.training.recorder import EpochAverages, MetricsRecorder, ProgressBar
from isotune.training.tasks import Task
from isotune.training.trainer import PlannedTraining, SFTTrainer, Trainer, TrainingPlan

# torch 2.13's fused AdamW rounds the last few numbers of a tensor otherwise on CPU (44 of 14,000 in ten steps, on
# tensors of 7), 8-bit optimizers quantize blocks, Adafactor factors matrices: to them a shard is another tensor.
POSITION_FREE_OPTIMIZERS = ("adamw_torch", "sgd")

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


def make_plan(recipe: RunRecipe, process: Process, data: RunData, task: Task) -> TrainingPlan:
    """The schedule of a recipe over its prepared data, and how its gradients are summed."""
    schedule = StepSchedule(
        data.train.documents,
        data.train.rows,
        global_batch_size=recipe.global_batch_size,
        microbatch_tokens=recipe.microbatch_tokens or recipe.max_seq_length,
        seed=recipe.seed,
    )
    eval_schedule = data.evaluation and StepSchedule(
        data.evaluation.documents,
        data.evaluation.rows,
        global_batch_size=len(data.evaluation.rows),
        microbatch_tokens=recipe.eval_microbatch_tokens or schedule.microbatch_tokens,
        seed=recipe.seed,
        shuffle=False,
    )

    def name_rows(step: Step, number: int) -> str:
        documents = next(microbatch.documents for microbatch in step.microbatches if microbatch.number == number)
        rows = [int(data.train.documents.source_rows[document]) for document in documents]
        return f"rows {', '.join(map(str, rows))} of {recipe.dataset_name}"

    action: Any = recipe.on_nonfinite  # one of the policy's two words
    nonfinite = NonFinitePolicy(action, fp16=recipe.fp16, name_rows=name_rows, is_main=process.is_main)
    exact, once = uses_exact_gradients(recipe, process), recipe.gradient_reduction == "step"
    return TrainingPlan(schedule, data.train, task, eval_schedule, data.evaluation, exact, once, nonfinite)


def build(
    kind: type[Trainer] | type[SFTTrainer],
    recipe: RunRecipe,
    process: Process,
    run: RunDir,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    data: RunData,
    task: Task,
) -> PlannedTraining:
    """The trainer of a run, with a recorder, a checkpointer and the checks before training."""
    run.check_room(sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad))
    plan = make_plan(recipe, process, data, task)
    roles = {role: found for role, found in (("train", data.train), ("evaluation", data.evaluation)) if found}
    early_stop = EarlyStop(recipe) if recipe.early_stopping_patience is not None else None
    fingerprints = {role: found.fingerprint for role, found in roles.items()}
    checkpointer = Checkpointer(recipe, process, run, fingerprints, early_stop)
    progress = ProgressBar(quiet=bool(recipe.training_arguments.get("disable_tqdm")))
    averages = EpochAverages() if isinstance(recipe, ClassificationRecipe) else None
    trainer = kind(
        plan=plan,
        recorder=MetricsRecorder(task, progress, averages),
        checkpointer=checkpointer,
        model=model,
        args=sft_arguments(recipe, process) if kind is SFTTrainer else training_arguments(recipe, process),
        processing_class=tokenizer,
    )
    counts = {role: found.table.as_dict() for role, found in roles.items()}
    trainer.add_callback(PreTrainChecks(trainer, checkpointer, counts))
    trainer.add_callback(progress)  # after the checks, so that what they print stands above the bar
    if early_stop is not None:
        trainer.add_callback(early_stop)
    return trainer


def uses_exact_gradients(recipe: RunRecipe, process: Process) -> bool:
    """`auto` is on where few parameters are trained, under plain and DDP; ZeRO-1 and 2 in fp32 are asked for it.

    Raises UserError where it is asked for under an engine that cannot keep it.
    """
    asked_for, optimizer = recipe.exact_gradients is True, recipe.training_arguments["optim"]
    if asked_for and (process.fsdp or process.zero_stage in (0, 3)):
        engine = "FSDP" if process.fsdp else f"ZeRO-{process.zero_stage}"
        raise UserError(f"exact_gradients: true cannot hold under {engine}: use DDP, ZeRO-1 or ZeRO-2")
    if asked_for and process.deepspeed and (recipe.bf16 or recipe.fp16):
        raise UserError(
            "exact_gradients: true cannot hold under DeepSpeed in 16 bits, which rounds gradients itself: use DDP"
        )
    if asked_for and process.deepspeed and optimizer not in POSITION_FREE_OPTIMIZERS:
        raise UserError(
            f"exact_gradients: true under ZeRO needs optim: {' or '.join(POSITION_FREE_OPTIMIZERS)}, because "
            f"{optimizer} rounds a number by where it lies in a share: say so on every number of processes"
        )
    return recipe.sums_exactly(plain_or_ddp=not (process.deepspeed or process.fsdp))


def save(recipe: RunRecipe, run: RunDir, trainer: PlannedTraining, tokenizer: Any) -> FinalModelReport | None:
    """Write RUN/model on the main process, reopened and compared before it is called saved; every rank must call it.

    The base of an adapter that exists nowhere else, because it was made at random, is made again and written beside it.
    """
    accelerator = trainer.accelerator
    accelerator.wait_for_everyone()
    trainer.watchdog.stop()
    run.lease.check()
    report = None
    inner: Any = accelerator.unwrap_model(trainer.model_wrapped)
    model: Any = plain_model(inner, keep=accelerator.process_index == 0)
    load_whole_models()  # to be reopened, and to answer the sample question
    if model is not None:
        if recipe.tune != "full" and is_made_here(recipe):
            config = load_config(recipe)
            if trainer.plan.documents.num_labels is not None:
                config.num_labels = trainer.plan.documents.num_labels
            save_and_verify(load_base_model(recipe, config, torch.device("cpu")), tokenizer, run.base_model)
            model.peft_config["default"].base_model_name_or_path = str(run.base_model.resolve())
        report = save_and_verify(model, tokenizer, run.model)
        if trainer.recorder is not None:
            trainer.recorder.close()
    accelerator.wait_for_everyone()
    return report
