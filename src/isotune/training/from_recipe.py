"""From a recipe to a trained model: the frame of every training script around the script's own data.

start = start_run(recipe)       processes, run folder, configuration, tokenizer
data = ...                      the script's own: documents with their targets or classes
train_run(start, data, ...)     model, trainer, steps, RUN/model, and what finishes the run
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from isotune.checkpoint.engine_state import plain_model
from isotune.checkpoint.final_model import FinalModelReport, save_and_verify
from isotune.checkpoint.resume import as_requeued, open_run
from isotune.compat.deepspeed import load_whole_models
from isotune.compat.peft import base_model_of
from isotune.compat.transformers import attention_of
from isotune.config import ClassificationRecipe, Recipe, RunRecipe
from isotune.config.task_types import MULTI_LABEL, REGRESSION
from isotune.data.batch_schedule import Step, StepSchedule
from isotune.data.classification.thresholds import CHOSEN, Thresholds, thresholds_of
from isotune.data.documents import FIRST_TYPE, RunData
from isotune.data.sft.chat_format import AUTO, GUANACO, ChatFormat
from isotune.distributed.launch import Process, start_process
from isotune.distributed.precision import check_same_precision, with_precision
from isotune.distributed.ranks import call_on_main
from isotune.io.errors import UserError
from isotune.io.run_files import or_empty, read_recipe_values
from isotune.models.adapters.lora import add_adapters
from isotune.models.adapters.targets import choose_targets
from isotune.models.base.ending import end_generation
from isotune.models.base.head import BaseHead, set_names
from isotune.models.base.vocabulary import new_rows, without_text
from isotune.models.causal import CausalForm, install_causal
from isotune.models.class_loss import PROBLEM_TYPES, ClassLoss, DocumentLoss, LabelLoss, choose_weights, loss_of
from isotune.models.classifier import fit_tokenizer, install_classification, takes_token_types
from isotune.models.cpu.layers import enable_speedups
from isotune.models.layouts.fitting import release_memory
from isotune.models.layouts.layout import ALONE, PADDED
from isotune.models.opening import (
    AnyRecipe,
    is_made_here,
    load_base_model,
    load_config,
    load_tokenizer,
    within_positions,
)
from isotune.models.packed_attention import PACKED
from isotune.run.finishing import FinishingStep, finish, weights_of
from isotune.run.hub import open_hub
from isotune.run.preemption import MODEL_STEP, supervised
from isotune.run.run_dir import RunDir
from isotune.run.trackers import check_trackers
from isotune.training.arguments import sft_arguments, training_arguments, uses_exact_gradients
from isotune.training.callbacks import EarlyStop, PreTrainChecks
from isotune.training.checkpointer import Checkpointer
from isotune.training.failures.nonfinite import NonFinitePolicy
from isotune.training.failures.out_of_memory import MemoryPlan, OutOfMemoryPolicy
from isotune.training.recorder import EpochAverages, MetricsRecorder, ProgressBar
from isotune.training.router_balance import RouterBalance
from isotune.training.router_loss import RouterLoss
from isotune.training.tasks import ClassificationTask, SftTask, Task
from isotune.training.trainer import PlannedTraining, SFTTrainer, Trainer
from isotune.training.training_plan import TrainingPlan


@dataclass(frozen=True)
class Start:
    """A run before its data: its processes stand, its folder is free, nothing is written yet."""

    recipe: RunRecipe
    process: Process
    run: RunDir
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    recorded: dict[str, Any] = field(default_factory=dict[str, Any])  # by the run that this one goes on with
    chooses_tokens: bool = False  # nobody gave microbatch_tokens, so another size may be tried
    memory: MemoryPlan | None = None  # what was planned of a process's memory
    new_rows: tuple[int, ...] = ()  # of the embedding, which begin anew and are trained

    def with_values(self, **found: Any) -> "Start":
        """The same start with values that nobody gave, which its run records."""
        self.run.record(**found)
        return replace(self, recipe=self.run.recipe)

    def with_row_tokens(self, recipe: AnyRecipe) -> AnyRecipe:
        """The recipe that was given, with the max_seq_length that this run has."""
        tokens = self.recipe.max_seq_length
        return recipe if recipe.max_seq_length == tokens else recipe.with_values(max_seq_length=tokens)


def start_run(recipe: RunRecipe) -> Start:
    """Join this launch's processes, look at the run folder and load what reads texts.

    Raises AlreadyDone for a finished run, and UserError where any of these is not what the recipe says.
    """
    asked, recipe = recipe, as_requeued(recipe)
    chooses_precision, recorded = recipe.precision is not None, _recorded_values(recipe)
    recipe = with_precision(recipe, recorded)
    process = start_process(recipe)
    if process.is_main and recipe.resume != asked.resume:
        print(f"note        resume: {asked.resume} was for this job's first attempt; this one goes on from the last")
    if chooses_precision:
        check_same_precision(recipe, process.device)
        if process.is_main:
            print(f"precision   {recipe.mixed_precision.replace('no', 'fp32')}, by precision: auto")
    if isinstance(recipe, Recipe) and recipe.chat_format == AUTO and recorded:
        recipe = recipe.with_values(chat_format=recorded.get("chat_format", GUANACO))  # earlier versions knew one form
    longest = call_on_main(process, lambda: _row_tokens(recipe))
    if longest != recipe.max_seq_length:  # before the run's identity is asked for
        recipe = recipe.with_values(max_seq_length=longest)
        if process.is_main:
            print(f"length      max_seq_length is {longest}: {recipe.model_name_or_path} has no more positions")
    run = open_run(recipe, process)
    call_on_main(process, lambda: check_trackers(recipe.training_arguments.get("report_to") or ()))
    call_on_main(process, lambda: open_hub(recipe)).adopt()
    config, tokenizer = load_config(recipe), load_tokenizer(recipe)
    within_positions(recipe, config)
    if isinstance(recipe, Recipe) and recipe.chat_format == AUTO:  # the run records what it meant
        run.recipe = recipe = recipe.with_values(chat_format=ChatFormat.of(AUTO, tokenizer).kind)
    rows = new_rows(config, tokenizer, recipe)
    if rows and recipe.tune != "full" and (process.fsdp or process.zero_stage == 3):
        raise UserError("rows of new tokens are trained in a whole embedding: use ddp or ZeRO 0 to 2, or tune: full")
    if recipe.target_parameters and (process.fsdp or process.zero_stage == 3):
        raise UserError("target_parameters trains LoRA on whole weights of experts: use ddp or ZeRO 0 to 2")
    chooses = recipe.microbatch_tokens == "auto"
    return Start(recipe, process, run, config, tokenizer, recorded, chooses_tokens=chooses, new_rows=rows)


def _row_tokens(recipe: RunRecipe) -> int:
    """The recipe's max_seq_length, or the model's positions where nobody gave it and there are fewer."""
    if "max_seq_length" in recipe.given:
        return recipe.max_seq_length
    try:
        return within_positions(recipe, load_config(recipe)).max_seq_length
    except UserError:  # is said where the run needs the model
        return recipe.max_seq_length


def _recorded_values(recipe: RunRecipe) -> dict[str, Any]:
    """What the run that this one goes on with recorded, such as what `auto` meant; empty where there is none."""
    earlier = recipe.run_to_go_on_with
    return {} if earlier is None else or_empty(read_recipe_values, earlier)


def train_run(start: Start, data: RunData, finishing: Sequence[FinishingStep] = ()) -> None:
    """Build, train and save, and do what finishes the run; every rank must call it.

    The main process does the `finishing` with the saved model, before the run counts as finished; a RunFault of it is
    the run's. RUN/status.json says which error ended a run.
    """
    start.process.watchdog.enter("the loading of the model")
    trainer = build_trainer(start, build_model(start, data), data)
    with supervised(start.run, start.process):
        trainer.train()
        saved = save(start, trainer)
        if saved is not None:
            print(f"model       {start.run.model}: {saved}")
            start.run.status.step = trainer.state.global_step
            start.run.status.has_done(MODEL_STEP, weights_of(start.run))
        del trainer
        release_memory()  # for the saved model, which some steps open
        start.process.watchdog.enter("the finishing of the run")
        if saved is not None:
            finish(start.run, finishing)


def build_model(start: Start, data: RunData) -> nn.Module:
    """The model ready for training without padding: attention, loss and adapters in place.

    Built from the seed alone, so every rank has the same weights before any communication. Raises UserError as
    `load_base_model` does, or where class_weights does not fit the classes.
    """
    recipe, config, process = start.recipe, start.config, start.process
    device = process.loading_device(recipe)
    if isinstance(recipe, ClassificationRecipe):
        class_loss = _class_loss(recipe, data.train)
        if class_loss.class_weights is not None and process.is_main:
            names = data.train.class_names or range(len(class_loss.class_weights))
            weights = zip(names, class_loss.class_weights, strict=True)
            print(f"weights     of classes: {', '.join(f'{name} {weight:.4g}' for name, weight in weights)}")
        head = classes_of_task(config, data.train)
        if head.line is not None and not is_made_here(recipe) and process.is_main:
            print(f"head        {head.line}")
        say_new = _say_new if process.is_main else None
        base = load_base_model(recipe, config, device, head, say_new, start.new_rows)
        layout = install_classification(base, class_loss, recipe.max_seq_length)
        if layout.name == ALONE and (process.fsdp or process.zero_stage == 3):
            raise UserError(
                f"model type '{config.model_type}' runs one text at a time, so ranks would need each other's shards at "
                f"different times: use ddp or ZeRO 0 to 2, not {'FSDP' if process.fsdp else 'ZeRO-3'}"
            )
        if layout.reason and process.is_main:
            how = {PADDED: "padded", ALONE: "run one at a time"}[layout.name]
            print(f"note        texts are {how}, as model type '{config.model_type}' cannot be packed: {layout.reason}")
        if FIRST_TYPE in data.train.documents.columns and not takes_token_types(base) and process.is_main:
            print(
                f"note        model type '{config.model_type}' has no token types: its two texts differ by place alone"
            )
        padding = fit_tokenizer(base, layout, start.tokenizer)
        if padding is not None and process.is_main:
            print(f"note        {padding}")
    else:
        base = load_base_model(recipe, config, device, new_rows=start.new_rows)
        form = install_causal(base, recipe.max_seq_length)
        if process.is_main:
            _say_form(form)
        end_generation(base, start.tokenizer)
    if start.new_rows and process.is_main:
        count, whose = len(start.new_rows), "their rows of the embedding begin as the mean of the others"
        print(f"tokens      {count:,} new: {whose}, and are trained")
        if unseen := without_text(start.tokenizer, recipe.add_tokens or (), data.train.documents.input_ids):
            print(f"no effect   no document has {', '.join(map(repr, unseen))} of add_tokens: nothing is learnt of it")
    if recipe.tune != "full" and process.is_main:
        _say_left_out(base, recipe)
    model = base if recipe.tune == "full" else add_adapters(base, recipe, start.new_rows)
    enable_speedups(model, zero3=process.zero_stage == 3)
    return model


def _say_new(names: Sequence[str]) -> None:
    modules = dict.fromkeys(name.rsplit(".", 1)[0] for name in names)
    print(f"new         {', '.join(modules)}: in no file of the base, drawn from the seed and trained whole")


def _say_left_out(base: Any, recipe: RunRecipe) -> None:
    if left := sorted({re.sub(r".*\.\d+\.", "", name) for name in choose_targets(base, recipe).left_out}):
        print(f"note        {', '.join(left)} get no adapter: peft's LoRA does not reach them in this model type")


def _say_form(form: CausalForm) -> None:
    if form.why_padded is not None:
        print(f"note        documents are padded, one a line: packed in a row, {form.why_padded}")
    if form.stock_logits:
        print("note        the loss needs all logits of a microbatch at once: the model does more than apply its head")


def make_plan(recipe: RunRecipe, process: Process, data: RunData, task: Task) -> TrainingPlan:
    """The schedule of a recipe over its prepared data, and how its gradients are summed."""
    exact, once = uses_exact_gradients(recipe, process), recipe.gradient_reduction == "step"
    schedule = StepSchedule(
        data.train.documents,
        data.train.rows,
        global_batch_size=recipe.global_batch_size,
        microbatch_tokens=recipe.forward_tokens("microbatch_tokens"),
        ranks=None if exact else process.world_size,
        padded=task.pads,
        seed=recipe.seed,
    )
    eval_schedule = data.evaluation and StepSchedule(
        data.evaluation.documents,
        data.evaluation.rows,
        global_batch_size=len(data.evaluation.rows),
        microbatch_tokens=recipe.forward_tokens("eval_microbatch_tokens"),
        padded=task.pads,
        seed=recipe.seed,
        shuffle=False,
    )

    def name_rows(step: Step, number: int) -> str:
        documents = next(microbatch.documents for microbatch in step.microbatches if microbatch.number == number)
        rows = [int(data.train.documents.source_rows[document]) for document in documents]
        return f"rows {', '.join(map(str, rows))} of {recipe.dataset_name}"

    action: Any = recipe.on_nonfinite  # one of the policy's two words
    advice = "; on_nonfinite: skip would leave such updates out"
    is_main = process.is_main
    nonfinite = NonFinitePolicy(action, fp16=recipe.fp16, name_rows=name_rows, advice=advice, is_main=is_main)
    ratio = recipe.loraplus_lr_ratio
    return TrainingPlan(schedule, data.train, task, eval_schedule, data.evaluation, exact, once, ratio, nonfinite)


def build_trainer(start: Start, model: nn.Module, data: RunData) -> PlannedTraining:
    """The schedule and the trainer that carries it out, with a recorder, a checkpointer and checks before training."""
    recipe, process, run = start.recipe, start.process, start.run
    run.check_room(sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad))
    classifies = isinstance(recipe, ClassificationRecipe)
    task = _classification_task(start, model, data.train) if classifies else _sft_task(recipe, model)
    plan = replace(plan := make_plan(recipe, process, data, task), out_of_memory=_out_of_memory(start, plan))
    roles = {role: found for role, found in (("train", data.train), ("evaluation", data.evaluation)) if found}
    early_stop = EarlyStop(recipe) if recipe.early_stopping_patience is not None else None
    fingerprints = {role: found.fingerprint for role, found in roles.items()}
    checkpointer = Checkpointer(recipe, process, run, fingerprints, early_stop)
    progress = ProgressBar(quiet=bool(recipe.training_arguments.get("disable_tqdm")))
    trainer = (Trainer if classifies else SFTTrainer)(
        plan=plan,
        recorder=MetricsRecorder(task, progress, EpochAverages() if classifies else None),
        checkpointer=checkpointer,
        model=model,
        args=(training_arguments if classifies else sft_arguments)(recipe, process),
        processing_class=start.tokenizer,
    )
    counts = {role: found.table.as_dict() for role, found in roles.items()}
    trainer.add_callback(PreTrainChecks(trainer, counts))
    trainer.add_callback(progress)  # after the checks, so that what they print stands above the bar
    if early_stop is not None:
        trainer.remove_callback(checkpointer)  # to stand after it: a pause at an evaluation keeps its count
        trainer.add_callback(early_stop)
        trainer.add_callback(checkpointer)
    return trainer


def _out_of_memory(start: Start, plan: TrainingPlan) -> OutOfMemoryPolicy:
    """Another size is tried where nobody gave one and ranks can tell each other before they need each other."""
    recipe, process, schedules = start.recipe, start.process, [plan.schedule]
    same_size = "eval_microbatch_tokens" not in recipe.given
    if plan.eval_schedule is not None and same_size:
        schedules.append(plan.eval_schedule)
    may_try = start.chooses_tokens and not (process.deepspeed or process.fsdp)
    return OutOfMemoryPolicy(
        schedules,
        recipe.max_seq_length if may_try else None,
        start.memory,
        lambda tokens: start.run.record(microbatch_tokens=tokens),
        process.is_main,
        halves_evaluation=may_try and same_size,
    )


def _attention_of(model: nn.Module) -> str:
    return str(attention_of(base_model_of(model).config))


def _sft_task(recipe: Any, model: nn.Module) -> SftTask:
    attention, coefficient = _attention_of(model), recipe.router_aux_loss_coef
    if not coefficient:
        return SftTask(attention)
    if attention != PACKED:
        raise UserError("router_aux_loss_coef balances routers over packed rows, and this model's documents are padded")
    return SftTask(attention, RouterLoss(coefficient, RouterBalance.of(model)))


def classes_of_task(config: PreTrainedConfig, train: Any) -> BaseHead:
    """Write the classes of the training data into the model's configuration; what becomes of the head of the base."""
    kind = PROBLEM_TYPES[train.task_type]
    head = BaseHead.of(config, train.num_labels, train.class_names, kind)
    set_names(config, train.num_labels, train.class_names, kind)
    return head


def _classification_task(start: Start, model: nn.Module, train: Any) -> ClassificationTask:
    run, attention = start.run, _attention_of(model)

    def write_predictions(step: int, lines: str) -> None:
        folder = run.path / "eval" / f"step-{step:08d}"
        run.lease.check()  # no folder of a run that is gone or another's
        folder.mkdir(parents=True, exist_ok=True)
        run.lease.write_file(folder / "predictions.jsonl", lines)

    write = write_predictions if start.process.is_main else None
    loss = _class_loss(start.recipe, train)
    names, thresholds = train.class_names, _thresholds(start.recipe, train)
    return ClassificationTask(
        train.documents, train.num_labels, loss, attention, write, names, train.task_type, thresholds
    )


def _thresholds(recipe: Any, train: Any) -> Thresholds:
    """The probabilities from which a text has a label, where the recipe gives them; a UserError for another number."""
    given = recipe.label_thresholds
    return thresholds_of(None if given == CHOSEN else given, train.num_labels)


def _class_loss(recipe: Any, train: Any) -> DocumentLoss:
    """The loss that the recipe asks for; a UserError where class_weights does not fit the training data's classes."""
    if train.task_type == REGRESSION:
        return loss_of(REGRESSION)
    weights = choose_weights(recipe.class_weights, np.asarray(train.documents.labels), train.num_labels)
    return LabelLoss(weights) if train.task_type == MULTI_LABEL else ClassLoss(weights, recipe.label_smoothing_factor)


def save(start: Start, trainer: PlannedTraining) -> FinalModelReport | None:
    """Write RUN/model on the main process, reopened and compared before it is called saved; every rank must call it.

    The base of an adapter that exists nowhere else, because it was made at random, is made again and written beside it.
    """
    recipe, run, accelerator = start.recipe, start.run, trainer.accelerator
    accelerator.wait_for_everyone()
    trainer.watchdog.enter("the saving of the model")
    run.lease.check()
    report = None
    inner: Any = accelerator.unwrap_model(trainer.model_wrapped)
    model: Any = plain_model(inner, keep=accelerator.process_index == 0)
    load_whole_models()  # to be reopened, and to answer the sample question
    if model is not None:
        if recipe.tune != "full" and is_made_here(recipe):
            config = load_config(recipe)
            if trainer.plan.documents.num_labels is not None:
                classes_of_task(config, trainer.plan.documents)
            base = load_base_model(recipe, config, torch.device("cpu"))
            save_and_verify(base, start.tokenizer, run.base_model)
            model.peft_config["default"].base_model_name_or_path = str(run.base_model.resolve())
        report = save_and_verify(model, start.tokenizer, run.model)
        if trainer.recorder is not None:
            trainer.recorder.close()
    accelerator.wait_for_everyone()
    return report
