"""The trainer that stands before the library's: its schedule, its evaluation, its predictions."""

import copy
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import transformers
from accelerate.utils import gather_object
from torch import nn
from transformers import EvalPrediction, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput, denumpify_detensorize
from trl.trainer.sft_trainer import SFTTrainer as TrlSFTTrainer

from isotune.compat.peft import base_model_of
from isotune.compat.transformers import attention_of, use_one_gpu
from isotune.data.batch_schedule import StepSchedule
from isotune.data.datasets import IGNORED, documents_of
from isotune.data.documents import Documents, Rows
from isotune.data.packing import one_document_per_row, pack
from isotune.drop_in.refusals import refuse
from isotune.io.errors import UserError
from isotune.models.causal import install_causal
from isotune.models.classifier import ClassLoss, install_classification
from isotune.models.cpu.layers import enable_speedups
from isotune.models.isolation import check_isolation
from isotune.training.tasks import ClassificationTask, EvaluationRun, SftTask, Task
from isotune.training.trainer import PlannedTraining
from isotune.training.training_plan import TrainingPlan


@dataclass(frozen=True)
class Laid:
    """Rows that a dataset was made into."""

    documents: Documents
    rows: Rows
    labelled: bool  # whether there is a loss to compute


class DropIn(PlannedTraining):
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
        args = given.get("args")
        refuse(self, args, given)
        self._row_tokens: int | None = None
        self._laid: dict[int, tuple[Any, Laid]] = {}  # by the identity of the dataset, which is kept beside
        self._unlabelled, self.causal = False, True
        self.microbatch_tokens, self._exact = microbatch_tokens, exact_gradients
        self.global_batch_size = global_batch_size
        if args is not None:
            args = given["args"] = copy.copy(args)
            if getattr(args, "packing", False):
                self._row_tokens = args.max_length
            if hasattr(args, "packing"):  # TRL prepares the rows, and packs none
                args.packing = args.eval_packing = args.padding_free = False
            if self.global_batch_size is None:
                launched = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
                self.global_batch_size = launched
            args.gradient_accumulation_steps, args.average_tokens_across_devices = 1, False
            use_one_gpu(args)
        super().__init__(plan=self._make_plan, **given)
        self.add_callback(_SelfTest(self))

    # ---- the schedule ----

    def _make_plan(self) -> TrainingPlan:
        args, model = self.args, cast(nn.Module, self.model)
        base = base_model_of(model)
        self.causal = not type(base).__name__.endswith("ForSequenceClassification")
        if self.global_batch_size is None:
            self.global_batch_size = args.per_device_train_batch_size * args.world_size
        train = self._lay_out(self.train_dataset, self._row_tokens)
        longest = int(train.documents.lengths.max())
        task = self._install(base, longest, train.documents)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        few = 2 * trained < sum(p.numel() for p in model.parameters())
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        exact = bool(self._exact) if self._exact != "auto" else few and not sharded
        schedule = self._schedule(train, task, self.global_batch_size, None if exact else args.world_size)
        if args.process_index == 0:
            print(
                f"isotune     {self.global_batch_size} rows an update, on any launch by global_batch_size=", flush=True
            )
        return TrainingPlan(schedule, train, task, exact_gradients=exact)

    def _install(self, base: Any, longest: int, documents: Documents) -> Task:
        """Patch the model once, and say what it learns."""
        if self.causal:
            form = install_causal(base, longest)
            if form.why_padded is not None and self.args.process_index == 0:
                print(f"note        documents are padded, one a line: packed in a row, {form.why_padded}")
            task: Task = SftTask(str(attention_of(base.config)))
        else:
            class_loss = ClassLoss(None, self.args.label_smoothing_factor)
            install_classification(base, class_loss)
            attention = str(attention_of(base.config))
            task = ClassificationTask(documents, base.config.num_labels, class_loss, attention)
        enable_speedups(cast(nn.Module, self.model), zero3=False)
        return task

    def _lay_out(self, dataset: Any, row_tokens: int | None = None) -> Laid:
        """The documents of a dataset, and their rows; read once."""
        if dataset is None:
            raise UserError("there is no dataset: give train_dataset, or a dataset to evaluate")
        kept = self._laid.get(id(dataset))
        if kept is not None and kept[0] is dataset:
            return kept[1]
        documents, labelled = documents_of(dataset, causal=self.causal, is_main=self.args.process_index == 0)
        seed = self._data_seed
        rows = pack(documents.lengths, row_tokens, seed=seed) if row_tokens else one_document_per_row(len(documents))
        self._laid[id(dataset)] = dataset, Laid(documents, rows, labelled)
        return self._laid[id(dataset)][1]

    @property
    def _data_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def _schedule(self, laid: Laid, task: Task, batch: int, ranks: int | None = None, **options: Any) -> StepSchedule:
        longest = int(laid.rows.lengths(laid.documents.lengths).max())
        return StepSchedule(
            laid.documents,
            laid.rows,
            global_batch_size=batch,
            microbatch_tokens=max(longest, self.microbatch_tokens or 0),
            ranks=ranks,
            padded=task.pads,
            seed=self._data_seed,
            **options,
        )

    # ---- evaluation: one prediction a row, and one division ----

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """The rows of an evaluation set, by its name where there are several."""
        if isinstance(eval_dataset, str):
            eval_dataset = cast(Any, self.eval_dataset)[eval_dataset]
        return self.get_test_dataloader(self.eval_dataset if eval_dataset is None else eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """The rows of any dataset, with the model, for `evaluation_loop`."""
        laid = self._lay_out(test_dataset)
        step = self._schedule(laid, self.plan.task, len(laid.rows), shuffle=False).step(0)
        model: Any = self.model_wrapped
        run = EvaluationRun(model, step, laid.documents, self.accelerator, self.watchdog, self.state.global_step)
        self._unlabelled = not laid.labelled
        return run

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: Any = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The exact loss, and where predictions are wanted one a row, in the order of the rows."""
        run, labelled = dataloader, not self._unlabelled
        loss_only = self.args.prediction_loss_only if prediction_loss_only is None else prediction_loss_only
        metrics: dict[str, Any] = {}
        if labelled:
            found = self.plan.task.evaluate(run)
            metrics = found if self.compute_metrics is None else {"eval_loss": found["eval_loss"]}
        predictions = labels = None
        if not loss_only:
            predictions = self._predictions(run)
            labels = self._labels(run.documents) if labelled else None
            if self.compute_metrics is not None and labels is not None:
                own = self.compute_metrics(EvalPrediction(predictions=predictions, label_ids=labels))
                metrics |= {f"eval_{name}": value for name, value in dict(own).items()}
        prefix = f"{metric_key_prefix}_"
        plain = cast(dict[str, Any], denumpify_detensorize(metrics))
        named = {prefix + name.removeprefix("eval_"): value for name, value in plain.items()}
        return EvalLoopOutput(predictions=predictions, label_ids=labels, metrics=named, num_samples=len(run.documents))  # type: ignore[arg-type]  (as stock, None where there are none)

    @torch.no_grad()
    def _predictions(self, run: EvaluationRun) -> np.ndarray:
        """What the model says of each row, [rows, ...], filled up with -100 where rows differ in length."""
        own: list[tuple[int, np.ndarray]] = []
        prepare = self.preprocess_logits_for_metrics or (lambda logits, labels: logits)
        for microbatch, found in run.outputs(targets=False):
            if not microbatch.weight:
                continue
            lengths = run.documents.lengths[list(microbatch.documents)].tolist()
            logits = found.logits[0].split(lengths) if self.causal else found.logits
            for document, of_row in zip(microbatch.documents, logits, strict=True):
                made = prepare(of_row[None], self._label(run.documents, document))[0]
                own.append((document, (made.float() if made.is_floating_point() else made).cpu().numpy()))
        found_rows = dict(gather_object(own))
        return _stacked([found_rows[row] for row in range(len(run.documents))])

    def _label(self, documents: Documents, document: int) -> torch.Tensor:
        return torch.from_numpy(np.asarray(self._labels(documents, [document]))).to(self.args.device)

    def _labels(self, documents: Documents, chosen: Iterable[int] | None = None) -> np.ndarray:
        """Labels as the library's collators make them: classes, or tokens with -100 where nothing is supervised."""
        numbers = range(len(documents)) if chosen is None else chosen
        if not self.causal:
            return documents.labels[list(numbers)].astype(np.int64)
        tokens = np.where(documents.supervised, documents.input_ids, IGNORED).astype(np.int64)
        return _stacked([tokens[documents.starts[n] : documents.starts[n + 1]] for n in numbers])


class _SelfTest(TrainerCallback):
    """Before the first step: replace one document of a row, and refuse to train where a neighbour notices."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """On the prepared model."""
        of = self.trainer
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(of.accelerator.mixed_precision, torch.float32)
        vocabulary = base_model_of(of.model).config.get_text_config().vocab_size
        options: dict[str, Any] = {"classifier": not of.causal, "padded": of.plan.task.pads}
        of.isolation = check_isolation(of.model_wrapped, vocabulary, args.device, dtype, **options)


class Trainer(DropIn, transformers.Trainer):
    """`transformers.Trainer`: causal language models and classifiers on tokenised rows."""


class SFTTrainer(DropIn, TrlSFTTrainer):
    """`trl.SFTTrainer`: its loading, templates and preparation; our packing, loss and update."""


def describe(trainer: Any) -> str:
    """What is guaranteed of a trainer's result, a line each, to be printed."""
    plan = trainer.plan
    launch = f"{trainer.args.world_size} process{'es' if trainer.args.world_size > 1 else ''}"
    bits = "bit for bit" if plan.exact_gradients else "to rounding"
    lines = [
        f"an update   {plan.schedule.global_batch_size} rows, on this launch of {launch} and on any other",
        f"losses      the sum over the update's {plan.task.target.replace('_', ' ')}, divided once by their number",
        f"gradients   the same on any number of processes, {bits}",
        "dropout     of the document: not of its neighbours, its microbatch or its rank",
        f"attention   {plan.task.attention}: no document sees another",
    ]
    return "\n".join(lines)


def _stacked(arrays: list[np.ndarray]) -> np.ndarray:
    if len({array.shape for array in arrays}) == 1:
        return np.stack(arrays)
    whole = np.full((len(arrays), max(map(len, arrays)), *arrays[0].shape[1:]), IGNORED, arrays[0].dtype)
    for row, array in zip(whole, arrays, strict=True):
        row[: len(array)] = array
    return whole
