"""The trainer that stands before the library's: its schedule, its evaluation, its predictions."""

import copy
import inspect
import operator
import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import transformers
from torch import nn
from transformers import DataCollatorForLanguageModeling, TrainerCallback, TrainingArguments
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer as TrlSFTTrainer
from trl.trainer.utils import get_config_model_id

from isotune.checkpoint.store import is_checkpoint
from isotune.compat.peft import base_model_of
from isotune.compat.transformers import attention_of, use_one_gpu
from isotune.data.batch_schedule import Step, StepSchedule
from isotune.data.datasets import LABEL_COLUMNS, collated, documents_of, is_streamed, label_column
from isotune.data.documents import Documents, Rows
from isotune.data.packing import one_document_per_row, pack
from isotune.distributed.ranks import world_size
from isotune.drop_in.columns import check_columns, check_targets, check_tokens, collator_note, masked_token
from isotune.drop_in.describe import not_exact
from isotune.drop_in.embedding_noise import set_noise
from isotune.drop_in.evaluation import DropInEvaluation, Laid
from isotune.drop_in.fields import unknown, without_effect
from isotune.drop_in.model_loss import check_model_loss, has_other_loss
from isotune.drop_in.own_loss import Batch, OwnLoss
from isotune.drop_in.predictions import tokens_of
from isotune.drop_in.refusals import check_model, refuse, refuse_engine, refuse_overrides, uses_exact_gradients
from isotune.drop_in.resuming import SeenUpdates, go_on
from isotune.drop_in.sessions import sessions_of
from isotune.io.errors import UserError, first_line
from isotune.models.causal import install_causal
from isotune.models.class_loss import ClassLoss
from isotune.models.classifier import install_classification
from isotune.models.cpu.layers import enable_speedups
from isotune.models.isolation import check_isolation
from isotune.models.packed_attention import max_positions
from isotune.training.failures.nonfinite import NonFinitePolicy
from isotune.training.tasks import ClassificationTask, SftTask, Task
from isotune.training.trainer import PlannedTraining
from isotune.training.training_plan import TrainingPlan

# arguments that the library is given otherwise, beside gradient_accumulation_steps
CHANGED = (
    *("average_tokens_across_devices", "neftune_noise_alpha", "packing", "eval_packing", "padding_free"),
    "router_aux_loss_coef",
)
# arguments that a plan is made by, beside that one
PLANNED_BY = (
    *("per_device_train_batch_size", "seed", "data_seed", "train_sampling_strategy", "label_names", "loss_type"),
    *("label_smoothing_factor", "max_grad_norm"),
)
LIBRARY_LOSSES = (transformers.Trainer.compute_loss, TrlSFTTrainer.compute_loss)
PREPARED_CLASSES = (None, "single_label_classification")  # problem types with a summed loss of their own


class DropIn(DropInEvaluation):
    """Stands before a library's trainer class, with that class's constructor.

    Beside its arguments:
        global_batch_size: rows of one update, on any launch.
        microbatch_tokens: of one forward pass, the memory knob; by default those of the longest row.
        exact_gradients: sum gradients as integers, the same bits on any number of processes; `auto` does so where fewer
            than half of the parameters are trained, under plain and DDP.

    UserError for what would make the result depend on the launch, or has no meaning in a schedule.
    """

    def __init__(
        self,
        *arguments: Any,
        global_batch_size: int | None = None,
        microbatch_tokens: int | None = None,
        exact_gradients: bool | str = "auto",
        **options: Any,
    ) -> None:
        library = super(PlannedTraining, self).__init__
        given = dict(inspect.signature(library).bind(*arguments, **options).arguments)
        args = self.given_args = given.get("args") or self._default_args(given.get("model"))
        refuse(args, given)
        refuse_overrides(type(self), SFTTrainer if isinstance(self, SFTTrainer) else Trainer)
        self._row_tokens: int | None = None
        self._laid: dict[tuple[int, bool], tuple[Any, Laid]] = {}  # by the dataset's identity; it is kept
        self._unlabelled, self.causal = False, True
        self.own_loss: OwnLoss | None = None
        self.microbatch_tokens, self._exact = microbatch_tokens, exact_gradients
        self._pinned, self.global_batch_size = global_batch_size is not None, global_batch_size
        self._noise = getattr(args, "neftune_noise_alpha", None)
        self._accumulation = 1
        self._planned_with: tuple[tuple[Any, ...], list[Any]] = (), []
        self._given_values = _values_of(args)
        args = given["args"] = copy.copy(args)
        if getattr(args, "packing", False):
            self._row_tokens = args.max_length
        if hasattr(args, "packing"):  # TRL prepares the rows, and packs none
            args.packing = args.eval_packing = args.padding_free = False
            args.router_aux_loss_coef = 0.0
        self._take_accumulation(args)
        args.average_tokens_across_devices, args.neftune_noise_alpha = False, None
        super().__init__(plan=self._make_plan, **given)
        if isinstance(self, SFTTrainer) and self.own_loss is None:
            self.say("mean_token_accuracy, entropy and num_tokens, which TRL's own step computes, are not logged")
        for line in not_exact(self):
            self.say(f"not exact: {line}")
        for names, what in (
            (without_effect(self.given_args), "no effect here"),
            (unknown(self.given_args), "of a later release of the library, and not known here"),
        ):
            self.say(f"{', '.join(names)}: {what}" if names else None)
        self.add_callback(_SelfTest(self))
        self.add_callback(SeenUpdates())

    def _default_args(self, model: Any) -> Any:
        """What the library takes where it is given no arguments."""
        if not isinstance(self, SFTTrainer):
            return TrainingArguments("tmp_trainer")
        name = model if isinstance(model, str) else get_config_model_id(model.config)
        return SFTConfig(f"{name.split('/')[-1]}-SFT")

    def _take_accumulation(self, args: Any) -> None:
        """An item of our loader is a whole update: microbatches that its user accumulates are rows of that."""
        if args.gradient_accumulation_steps != 1:
            self._accumulation, args.gradient_accumulation_steps = args.gradient_accumulation_steps, 1
        plugin = getattr(args, "deepspeed_plugin", None)
        for of_engine in (getattr(args, "hf_deepspeed_config", None), getattr(plugin, "hf_ds_config", None)):
            if of_engine is not None:  # whose backward would divide by it once more
                of_engine.config["gradient_accumulation_steps"] = 1

    # ---- the schedule ----

    def _make_plan(self) -> TrainingPlan:
        args, model = self.args, cast(nn.Module, self.model)
        refuse_engine(self)
        use_one_gpu(args)
        self._take_accumulation(args)  # accelerator_config sets it late
        if (launched := world_size()) != args.world_size:
            raise UserError(
                f"{launched} processes were launched, and TrainingArguments knows of {args.world_size}: without GPUs "
                "say use_cpu=True"
            )
        base = base_model_of(model)
        self.causal = not type(base).__name__.endswith("ForSequenceClassification")
        if not self._pinned:
            loaders: Any = args.accelerator_config
            sharing = 1 if loaders.split_batches else args.world_size
            self.global_batch_size = args.per_device_train_batch_size * self._accumulation * sharing
        assert self.global_batch_size is not None
        dataset: Any = self.train_dataset
        if dataset is None:  # a trainer that only evaluates
            evaluated = self.eval_dataset
            dataset = next(iter(evaluated.values())) if isinstance(evaluated, dict) else evaluated
            train = self._lay_out(dataset) if dataset is not None else self._nothing()
        else:
            train = self._lay_out(dataset, self._row_tokens)
            if self._skips_preparation and len(train.rows) < len(train.documents) and not train.packed:
                self.say(
                    "packing: TRL packs nothing where the preparation is skipped; "
                    f"{len(train.documents)} rows became {len(train.rows)}"
                )
            self._library_loader(dataset)  # remembers which columns the model's own forward takes
            self.say(collator_note(self.data_collator, dataset[0]) if self.causal else None)
            if not train.labelled:
                raise UserError(f"the train_dataset has none of the columns {', '.join(self._label_columns)}")
        task = self._install(base, train, dataset)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        few = 2 * trained < sum(p.numel() for p in model.parameters())
        exact = uses_exact_gradients(self, self._exact, few_trained=few)
        schedule = self._schedule(train, task, self.global_batch_size, ranks=None if exact else args.world_size)
        if args.process_index == 0:
            print(
                f"isotune     {self.global_batch_size} rows an update, on any launch by global_batch_size=", flush=True
            )
        self._planned_with, self._planned_loss = self._plans_with(), self.compute_loss_func
        return TrainingPlan(schedule, train, task, exact_gradients=exact, nonfinite=self._nonfinite(train.documents))

    def _plans_with(self) -> tuple[tuple[Any, ...], list[Any]]:
        """What a plan is made of, and a script may have changed when it trains: objects, and values."""
        values = [self._accumulation, *(getattr(self.args, name, None) for name in PLANNED_BY)]
        return (self.train_dataset, self.compute_loss_func, self.data_collator), values

    def _nonfinite(self, documents: Documents) -> NonFinitePolicy:
        """Stops where a loss or gradient is NaN or Inf, and names the rows of the dataset."""

        def rows(step: Step, number: int) -> str:
            chosen = next(own.documents for own in step.microbatches if own.number == number)
            return "row " + ", ".join(str(row + 1) for row in sorted(documents.ids[list(chosen)].tolist())[:5])

        args = self.args
        return NonFinitePolicy(fp16=args.fp16, name_rows=rows, is_main=args.process_index == 0)

    def _install(self, base: Any, train: Laid, dataset: Any) -> Task:
        """Patch the model once, and say what it learns."""
        check_model(base)
        longest = max(int(train.documents.lengths.max()), max_positions(base.config) or 0)
        if self.causal:
            form = install_causal(base, longest)
            self.say(form.why_padded and f"documents are padded, one a line: packed in a row, {form.why_padded}")
            task: Task = SftTask(str(attention_of(base.config)))
        else:
            class_loss = ClassLoss(None, self.args.label_smoothing_factor)
            layout = install_classification(base, class_loss, longest)
            self.say(layout.reason and f"documents are {layout.name}: packed, {layout.reason}")
            attention = str(attention_of(base.config))
            task = ClassificationTask(train.documents, base.config.num_labels, class_loss, attention)
        set_noise(base.get_input_embeddings(), self._noise)
        enable_speedups(cast(nn.Module, self.model), zero3=self._is_zero3)
        if not self._has_own_loss(base, train):
            return task
        if train.packed:
            raise UserError("a loss of your own is over rows of one document: give the dataset before it is packed")
        self.own_loss = OwnLoss(self, task, self.causal)
        if train.labelled:
            self._batches_of(self.own_loss, train, dataset)
            self.own_loss.probe(train.documents)
        return self.own_loss

    def _has_own_loss(self, base: Any, train: Laid) -> bool:
        """Whether the loss is not the one that is summed without all logits in memory."""
        given = self._has_given_loss(base) or getattr(self.args, "loss_type", "nll") not in (None, "nll")
        smooths_tokens = self.causal and self.args.label_smoothing_factor > 0
        other_kind = not self.causal and (
            base.config.num_labels < 2 or base.config.problem_type not in PREPARED_CLASSES
        )
        return given or smooths_tokens or other_kind or not train.has_classes

    def _has_given_loss(self, base: Any) -> bool:
        """Whether the loss is a function of the user's, to which targets may mean anything."""
        own = type(self).compute_loss not in (DropIn.compute_loss, *LIBRARY_LOSSES)
        own = own or self.compute_loss_func is not None
        return own or has_other_loss(base, causal=self.causal)

    def labelled_row(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens and labels of the shortest row of training, [1, tokens] and [1, ...], on the device."""
        laid: Laid = self.plan.documents
        row, device = int(laid.documents.lengths.argmin()), self.args.device
        ids = tokens_of(laid.documents, row)
        label = torch.as_tensor(self.label_of(laid.documents, laid.targets)(row), device=device)
        label = label.float() if label.is_floating_point() else label
        return torch.from_numpy(ids)[None].to(device), label[None]

    @property
    def _is_zero3(self) -> bool:
        plugin = self.accelerator.state.deepspeed_plugin if self.is_deepspeed_enabled else None
        return plugin is not None and plugin.zero_stage == 3

    def _library_loader(self, dataset: Any) -> Any:
        return super(PlannedTraining, self).get_test_dataloader(dataset)

    def say(self, note: str | None) -> None:
        """Print a note, on the main process; nothing where it is empty."""
        if note and self.args.process_index == 0:
            print(f"note        {note}")

    def _batches_of(self, own: OwnLoss, laid: Laid, dataset: Any) -> None:
        """Let a loss of one's own have the batches that the library makes of these documents."""
        loader = self._library_loader(dataset)
        rows, collate = loader.dataset, loader.collate_fn

        def batch(numbers: Sequence[int]) -> Batch:
            try:
                return dict(collate([rows[number] for number in numbers]))
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(
                    f"the data_collator makes no batch of {len(numbers)} rows: {first_line(error)}"
                ) from error

        own.batches[id(laid.documents)] = batch

    def _lay_out(self, dataset: Any, row_tokens: int | None = None, *, keep_all: bool = False) -> Laid:
        """The documents of a dataset, and their rows; read once."""
        if dataset is None:
            raise UserError("there is no dataset: give train_dataset, or a dataset to evaluate")
        kept = self._laid.get((id(dataset), keep_all))
        if kept is not None and kept[0] is dataset:
            return kept[1]
        is_main = self.args.process_index == 0
        rows_only = self._rows_for(dataset)
        if self._skips_preparation:
            _check_tokenised(rows_only)
        documents, targets, labelled = documents_of(
            rows_only,
            causal=self.causal,
            label_names=self.args.label_names or (),
            label_columns=self._library_columns,
            masked_token=masked_token(self.data_collator),
            is_main=is_main,
            keep_all=keep_all,
        )
        base = base_model_of(cast(nn.Module, self.model))
        if not isinstance(self, SFTTrainer):  # TRL hands no such column on either
            check_columns(base, rows_only[0], self._label_columns)
        check_tokens(base.get_input_embeddings(), documents)
        column = label_column(rows_only[0], self.args.label_names or (), self._library_columns, causal=self.causal)
        if targets is not None and column is not None and not self._has_given_loss(base):
            check_targets(base.config, targets, column)
        if (positions := max_positions(base.config)) is not None:
            _check_longest(documents, positions, "the model has positions for")
        starts = np.flatnonzero(np.diff(documents.source_rows, prepend=-1))
        packed = len(starts) < len(documents)
        if packed:  # as the dataset is
            rows = Rows(np.arange(len(documents)), np.append(starts, len(documents)))
        elif row_tokens:
            _check_longest(documents, row_tokens, "max_length is")
            rows = pack(documents.lengths, row_tokens, seed=self._data_seed)
        else:
            rows = one_document_per_row(len(documents))
        laid = Laid(documents, rows, targets, labelled, packed, column)
        self._laid[id(dataset), keep_all] = dataset, laid
        return laid

    def _nothing(self) -> Laid:
        """Two tokens, to plan a trainer by that is given its datasets later, to evaluate and to predict."""
        documents, _, _ = documents_of([{"input_ids": [0, 0]}], causal=self.causal)
        return Laid(documents, one_document_per_row(1), None, labelled=False)

    def _rows_for(self, dataset: Any) -> Any:
        """The rows of a dataset as its collator leaves them, which is as they are where it only pads."""
        of_library = str(getattr(self.data_collator, "__module__", "")).startswith(("transformers.", "trl."))
        if of_library or is_streamed(dataset):
            return dataset
        loader = self._library_loader(dataset)  # without the columns that it removes
        return collated(loader.dataset, loader.collate_fn, is_main=self.args.process_index == 0)

    @property
    def _skips_preparation(self) -> bool:
        return bool((getattr(self.args, "dataset_kwargs", None) or {}).get("skip_prepare_dataset"))

    @property
    def _label_columns(self) -> tuple[str, ...]:
        """Where labels are looked for; `label_names` of the arguments names another column."""
        return (*(self.args.label_names or ()), *self._library_columns)

    @property
    def _library_columns(self) -> tuple[str, ...]:
        """Of the library's names of labels those that the collator makes labels of."""
        by_itself = isinstance(self, SFTTrainer) or isinstance(self.data_collator, DataCollatorForLanguageModeling)
        return ("labels",) if self.causal and by_itself else LABEL_COLUMNS

    @property
    def _data_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def _schedule(
        self, laid: Laid, task: Task, batch: int, *, ranks: int | None = None, **options: Any
    ) -> StepSchedule:
        longest = int(laid.rows.lengths(laid.documents.lengths).max())
        return StepSchedule(
            laid.documents,
            laid.rows,
            global_batch_size=batch,
            microbatch_tokens=max(longest, self.microbatch_tokens or 0),
            padded=task.pads,
            seed=self._data_seed,
            **{"shuffle": self.args.train_sampling_strategy != "sequential", **options},
        )

    def train(self, resume_from_checkpoint: Any = None, *options: Any, **more: Any) -> Any:
        """The library's; UserError without rows, or where the checkpoint is of a run of `isotune`."""
        if self.train_dataset is None:
            raise UserError("there is no train_dataset to train on")
        folder = resume_from_checkpoint
        if isinstance(folder, str | os.PathLike) and is_checkpoint(Path(folder)):
            raise UserError(
                f"{folder} is a checkpoint of a run of isotune, which goes on with --resume: "
                "this trainer goes on from a checkpoint that it saved itself"
            )
        self._follow_given_args()
        refuse(self.args, {})
        with sessions_of(self):
            return super().train(resume_from_checkpoint, *options, **more)

    def compute_loss(self, model: Any, inputs: Any, *options: Any, **more: Any) -> Any:
        """The library's; UserError for an item of the train loader, which is a whole update."""
        if "microbatches" in inputs:
            raise UserError(
                "training_step is your own and calls compute_loss, but an item is a whole update: override "
                "compute_loss, or call super().training_step"
            )
        return super().compute_loss(model, inputs, *options, **more)

    def _follow_given_args(self) -> None:
        """What the script has changed of its own arguments since, which the library has no copy of."""
        now = _values_of(self.given_args)
        changed = {name: value for name, value in now.items() if value != self._given_values[name]}
        self._given_values = now
        self._accumulation = changed.pop("gradient_accumulation_steps", self._accumulation)
        for name, value in changed.items():
            if name not in CHANGED:
                setattr(self.args, name, value)

    def save_model(self, *options: Any, **more: Any) -> None:
        """The library's; training_args.bin has the arguments as they were given."""
        own = self.args
        self.args = copy.copy(own)
        self.args.gradient_accumulation_steps = self._accumulation
        for name in CHANGED:
            if hasattr(self.given_args, name):
                setattr(self.args, name, getattr(self.given_args, name))
        try:
            super().save_model(*options, **more)
        finally:
            self.args = own

    def _hp_search_setup(self, trial: Any) -> None:
        """Plan this training: with what a search has set by now, a fresh model, or another train_dataset."""
        if self.args.gradient_accumulation_steps == 1:  # else the script has set it since
            self.args.gradient_accumulation_steps = self._accumulation
        self._accumulation = 1
        super()._hp_search_setup(trial)
        self._take_accumulation(self.args)
        (objects, values), (planned_objects, planned_values) = self._plans_with(), self._planned_with
        changed = values != planned_values or not all(map(operator.is_, objects, planned_objects))
        if trial is not None or self.model_init is not None or changed:
            if changed:  # rows too may be read or packed otherwise
                self._laid.clear()
            self.own_loss = None
            self.plan = self._make_plan()
            self.make_update()


def _values_of(args: Any) -> dict[str, Any]:
    return {own.name: getattr(args, own.name) for own in fields(args)}


def _check_tokenised(dataset: Any) -> None:
    """UserError for rows that TRL would have tokenised, where its preparation is skipped."""
    if hasattr(dataset, "__len__") and len(dataset) and "input_ids" not in (row := dataset[0]):
        raise UserError(
            f"the rows have no input_ids, but {', '.join(row)}: take skip_prepare_dataset out of dataset_kwargs, and "
            "TRL tokenises them"
        )


def _check_longest(documents: Documents, limit: int, what: str) -> None:
    if (longest := int(documents.lengths.max())) > limit:
        row = int(documents.ids[documents.lengths.argmax()]) + 1
        raise UserError(f"row {row} of the dataset has {longest} tokens, and {what} {limit}")


class _SelfTest(TrainerCallback):
    """Before the first step: replace one document of a row, and refuse to train where a neighbour notices."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """On the prepared model, in the precision of its products."""
        of = self.trainer
        seen = next(own for own in of.callback_handler.callbacks if isinstance(own, SeenUpdates))
        of.say(go_on(state, of.plan, seen))
        if of.own_loss is None or of.own_loss.of_model:
            inputs, labels = of.labelled_row()
            check_model_loss(of.model, of.model_wrapped, inputs, labels, causal=of.causal)
        stored = next((p.dtype for p in of.model.parameters() if p.is_floating_point()), torch.float32)
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(of.accelerator.mixed_precision, stored)
        vocabulary = base_model_of(of.model).config.get_text_config().vocab_size
        options: dict[str, Any] = {"classifier": not of.causal, "padded": of.plan.task.pads}
        of.isolation = check_isolation(of.model_wrapped, vocabulary, args.device, dtype, **options)


class Trainer(DropIn, transformers.Trainer):
    """`transformers.Trainer`: causal language models and classifiers on tokenised rows."""


class SFTTrainer(DropIn, TrlSFTTrainer):
    """`trl.SFTTrainer`: its loading, templates and preparation; our packing, loss and update."""
