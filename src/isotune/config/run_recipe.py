"""The keys that every training run has: model, data, schedule, adapter, memory and output."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import Any, ClassVar, Literal

from isotune.config.adapter_start import read_start
from isotune.config.base_recipe import BaseRecipe
from isotune.config.engine_keys import (
    CHOOSES_THE_BEST,
    ENGINE_KEYS,
    WITH_EVALUATION,
    evaluates,
    wrong_optimiser_arguments,
    wrong_schedule_call,
)
from isotune.config.mixture import mixture_name, read_mixture
from isotune.config.schema import (
    ADAPTER,
    DATA,
    MEMORY,
    MODEL,
    OPTIMISER,
    OUTPUT,
    POSITIVE,
    REQUIRED,
    SCHEDULE,
    SHARE,
    Contradiction,
    Key,
    Range,
    Requirement,
    Values,
    key,
)
from isotune.io.formats import format_of
from isotune.io.run_files import run_of_checkpoint

_ADAPTER = Requirement(lambda values: values["tune"] != "full", "it needs tune: lora or tune: qlora")
_LORA = Requirement(
    lambda values: values["tune"] != "full" and values["peft_type"] == "lora",
    "it needs tune: lora or tune: qlora, and peft_type: lora",
)
# values that stand for what earlier versions did, which knew nothing else
UNSAID_BEFORE = {"chat_format": "guanaco", "peft_type": "lora", "task_type": "single_label"}
_LORA_ONLY = Requirement(
    lambda values: values["tune"] == "lora" and values["peft_type"] == "lora", "it needs tune: lora and peft_type: lora"
)
_FOUR_BIT = Requirement(lambda values: values["tune"] == "qlora", "it needs tune: qlora")
_NO_LIMIT = Requirement(lambda values: values["max_steps"] < 1, "max_steps says where the run ends")
_ONE_SOURCE = Requirement(
    lambda values: values["dataset_mixture"] is None, "each data set of dataset_mixture says its own"
)
_SPLIT = Requirement(
    lambda values: (
        values["dataset_mixture"] is None
        and (values["dataset_split"] == "train" or format_of(values["dataset_name"] or "") is None)
    ),
    "dataset_name is one file, which is one split, and each data set of dataset_mixture says its own",
)
_EVAL_SPLIT = Requirement(
    lambda values: (
        evaluates(values)
        and values["eval_dataset_name"] is not None
        and values["eval_dataset_mixture"] is None
        and (values["eval_dataset_split"] == "test" or format_of(values["eval_dataset_name"]) is None)
    ),
    f"{WITH_EVALUATION.otherwise}, one file is one split, and each data set of eval_dataset_mixture says its own",
)
_NAMED = Requirement(
    lambda values: not (values["model_name_or_path"] or "").startswith("builtin:"), "the model is built in"
)
_EVAL_DATA = Requirement(
    lambda values: (
        evaluates(values) and values["eval_dataset_name"] is not None and values["eval_dataset_mixture"] is None
    ),
    f"{WITH_EVALUATION.otherwise}, and each data set of eval_dataset_mixture says its own",
)
_UPLOADS = Requirement(lambda values: bool(values["push_to_hub"]), "it needs push_to_hub: true")
_PATIENCE = Requirement(lambda values: bool(values["early_stopping_patience"]), "it needs early_stopping_patience")
EVALUATION_ON = Requirement(lambda values: values["eval_strategy"] != "no", "eval_strategy is no")
_ONE_EVAL_SOURCE = Requirement(
    lambda values: values["eval_strategy"] != "no" and values["eval_dataset_mixture"] is None,
    "eval_strategy is no, or eval_dataset_mixture names the data",
)


def _hub_model_id(values: Values) -> str:
    return Path(values["output_dir"] or "").name


def _name_of_mixture(key: str) -> Callable[[Values], str | None]:
    return lambda values: mixture_name(values[key]) if values[key] else None


def _as_trained(name: str) -> Callable[[Values], Any]:
    """The value of a key of dataset_name, where eval_dataset_name is the same data set."""
    return lambda values: values[name] if values["eval_dataset_name"] == values["dataset_name"] else None


RESUME_NEWEST, RESUME_NEVER = "auto", "never"  # what `resume` says instead of a path


@dataclass(frozen=True, kw_only=True)
class RunRecipe(BaseRecipe):
    """The keys that every training run has, whatever its task."""

    # fmt: off
    task: Literal["sft", "classification"] = key("sft", MODEL, "what the model learns", changes_result=False)
    model_name_or_path: str = key(REQUIRED, MODEL, "Hub id, folder, or builtin:NAME", is_path=True)
    model_revision: str | None = key(
        None, MODEL, "branch, tag or commit of a model on the Hub", default_text="main", needs=_NAMED, common=False)
    model_init: Literal["pretrained", "random"] = key(
        "pretrained", MODEL, "take the model's weights, or its geometry with random weights")
    tokenizer_name_or_path: str | None = key(None, MODEL, "another tokenizer", default_text="the model's", is_path=True)
    add_tokens: tuple[str, ...] | None = key(
        None, MODEL, "texts that become a token each, whose rows of the embedding are new and trained", common=False,
        default_text="none")
    resize_embeddings: bool = key(
        False, MODEL, "add rows to the embedding, and train them, where the tokenizer has more tokens than it has rows",
        unset=False, common=False)
    tune: Literal["full", "lora", "qlora"] = key("lora", MODEL, "what is trained: all weights, or adapters")

    dataset_name: str = key(
        REQUIRED, DATA, "Hub id, folder, .jsonl/.csv/.parquet/... file, or builtin:NAME", is_path=True,
        needs=_ONE_SOURCE, default_from=_name_of_mixture("dataset_mixture"))
    dataset_mixture: list[dict[str, Any]] | None = key(
        None, DATA, "several data sets in place of dataset_name, each with a weight: how often its rows are read",
        read=read_mixture)
    dataset_split: str = key("train", DATA, "split to train on", needs=_SPLIT)
    dataset_config: str | None = key(
        None, DATA, "configuration of a data set that has several", default_text="its default", common=False,
        needs=_ONE_SOURCE)
    dataset_revision: str | None = key(
        None, DATA, "branch, tag or commit of a data set on the Hub", default_text="main", common=False,
        needs=_ONE_SOURCE)
    dataset_columns: list[str] | None = key(
        None, DATA, "names of the columns, in their order, of a CSV or TSV file whose first line is a row",
        default_text="those in line 1")
    eval_dataset_name: str | None = key(
        None, DATA, "data set to evaluate on", needs=_ONE_EVAL_SOURCE, is_path=True,
        default_from=_name_of_mixture("eval_dataset_mixture"), default_text="none")
    eval_dataset_mixture: list[dict[str, Any]] | None = key(
        None, DATA, "several data sets in place of eval_dataset_name, in the form of dataset_mixture",
        needs=EVALUATION_ON, read=read_mixture, common=False)
    eval_dataset_split: str = key("test", DATA, "split to evaluate on", needs=_EVAL_SPLIT)
    eval_dataset_config: str | None = key(
        None, DATA, "the same of eval_dataset_name", needs=_EVAL_DATA, default_from=_as_trained("dataset_config"),
        default_text="dataset_config where it is the same data set", common=False)
    eval_dataset_revision: str | None = key(
        None, DATA, "the same of eval_dataset_name", needs=_EVAL_DATA, default_from=_as_trained("dataset_revision"),
        default_text="dataset_revision where it is the same data set", common=False)
    allow_dropped: bool = key(
        False, DATA, "go on where more than half of the rows are left out", changes_result=False)
    max_seq_length: int = key(
        1024, DATA, "maximum length of a row, in tokens", allowed=Range(2),
        default_text="1024, or the model's positions where they are fewer")

    global_batch_size: int = key(16, SCHEDULE, "rows in one step, on any hardware", allowed=Range(1))
    num_train_epochs: float = key(3.0, SCHEDULE, "passes over the data", allowed=POSITIVE, needs=_NO_LIMIT)
    max_steps: int = key(
        -1, SCHEDULE, "stop after this many steps instead", allowed=Range(1, also=-1), unset=-1, default_text="none")
    early_stopping_patience: int | None = key(
        None, SCHEDULE, "end training after this many evaluations without an improvement of metric_for_best_model",
        allowed=Range(1), needs=WITH_EVALUATION)
    early_stopping_threshold: float = key(
        0.0, SCHEDULE, "an improvement of metric_for_best_model counts if it is larger than this",
        allowed=Range(0), needs=_PATIENCE, common=False)
    seed: int = key(42, SCHEDULE, "seed of order, dropout and new weights", allowed=Range(0, 2**32 - 1))

    peft_type: Literal["lora", "ia3"] = key(
        "lora", ADAPTER, "kind of adapter; ia3 scales activations", needs=_ADAPTER, common=False)
    r: int = key(16, ADAPTER, "rank of the LoRA matrices", allowed=Range(1), needs=_LORA)
    lora_alpha: int = key(32, ADAPTER, "LoRA's scale is lora_alpha / r", allowed=Range(1), needs=_LORA)
    lora_dropout: float = key(0.05, ADAPTER, "dropout before the LoRA matrices", allowed=SHARE, needs=_LORA)
    target_modules: list[str] | None = key(
        None, ADAPTER, "layers that get an adapter: names, one regular expression of whole names, or all-linear: every "
        "linear layer of the blocks", needs=_ADAPTER, default_text="those known for the model's type, else all-linear")
    exclude_modules: list[str] | None = key(
        None, ADAPTER, "layers of target_modules that get none: names, or one regular expression", needs=_ADAPTER,
        common=False)
    layers_to_transform: list[int] | None = key(
        None, ADAPTER, "numbers of the blocks whose layers get LoRA", allowed=Range(0), needs=_LORA, common=False,
        default_text="all")
    target_parameters: list[str] | None = key(
        None, ADAPTER, "weights of experts, which are no layers, that get LoRA too: ends of their names, such as "
        "experts.down_proj", needs=_LORA_ONLY, common=False)
    rank_pattern: dict[str, Any] | None = key(
        None, ADAPTER, "rank of layers by the end of their names, instead of r", needs=_LORA, common=False)
    alpha_pattern: dict[str, Any] | None = key(
        None, ADAPTER, "the same, instead of lora_alpha", needs=_LORA, common=False)
    bias: Literal["none", "all", "lora_only"] = key("none", ADAPTER, "biases to train beside LoRA", needs=_LORA)
    use_rslora: bool = key(False, ADAPTER, "scale by lora_alpha / sqrt(r)", needs=_LORA)
    use_dora: bool = key(False, ADAPTER, "train magnitudes apart from directions (DoRA)", needs=_LORA)
    init_lora_weights: bool | str = key(
        True, ADAPTER, "what LoRA starts from; true: the base as it is; pissa, pissa_niter_N and olora: the largest "
        "part of the base's own weights, which is trained", needs=_LORA, read=read_start)
    loraplus_lr_ratio: float | None = key(
        None, OPTIMISER, "LoRA+: the learning rate of the B matrices over that of the others", allowed=POSITIVE,
        needs=_LORA, common=False, default_text="1")
    modules_to_save: list[str] | None = key(None, ADAPTER, "modules to train in full and save", needs=_ADAPTER)
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = key("nf4", ADAPTER, "4-bit type of frozen weights", needs=_FOUR_BIT)
    bnb_4bit_use_double_quant: bool = key(
        True, ADAPTER, "quantise the scales of the 4-bit weights too", needs=_FOUR_BIT)

    device: Literal["auto", "cuda", "mps", "cpu"] = key(
        "auto", MEMORY, "what computes; auto: a GPU where there is one, else MPS on a Mac, else the CPU",
        changes_result=False, common=False)
    rendezvous_timeout: float | None = key(
        None, MEMORY, "seconds in which all processes of a launch have to find each other", changes_result=False,
        allowed=POSITIVE, common=False, default_text="120")
    bf16: bool = key(False, MEMORY, "compute in bfloat16")
    fp16: bool = key(False, MEMORY, "compute in float16, with a scaled loss")
    precision: Literal["auto"] | None = key(
        None, MEMORY, "auto: bf16 where the device has it, else fp16 on a GPU and fp32 on a CPU; chosen once",
        default_text="what bf16 and fp16 say", common=False)
    microbatch_tokens: int | Literal["auto"] = key(
        "auto", MEMORY, "tokens in one forward pass: the memory knob; auto: as many as fit and help, chosen once",
        allowed=Range(1), changes_result=False)
    eval_microbatch_tokens: int | Literal["auto"] = key(
        None, MEMORY, "the same in evaluation", allowed=Range(1), needs=WITH_EVALUATION,
        default_from=itemgetter("microbatch_tokens"), default_text="microbatch_tokens", changes_result=False,
        unset="auto", if_empty="auto")
    exact_gradients: bool | Literal["auto"] = key(
        "auto", MEMORY, "sum gradients as integers: the same bits on any number of processes")
    gradient_reduction: Literal["step", "pass"] = key(
        "step", MEMORY, "when ZeRO-2 and 3 reduce gradients: step is once an update; pass is every microbatch, with "
        "less memory", changes_result=False)
    on_nonfinite: Literal["stop", "skip"] = key("stop", MEMORY, "what happens when a loss or gradient is NaN or Inf")

    output_dir: str = key(REQUIRED, OUTPUT, "folder of the run", changes_result=False, is_path=True)
    resume: Literal["auto", "never"] | str = key(
        "auto", OUTPUT, "auto: from the newest complete checkpoint in output_dir; never: start anew; or a checkpoint's "
        "folder", changes_result=False, is_path=True)
    push_to_hub: bool = key(
        False, OUTPUT, "upload the saved model with its card to the Hugging Face Hub", changes_result=False)
    hub_model_id: str = key(
        None, OUTPUT, "its repository on the Hub, NAME or OWNER/NAME", needs=_UPLOADS, changes_result=False,
        default_from=_hub_model_id, default_text="the name of output_dir")
    hub_private_repo: bool | None = key(
        None, OUTPUT, "whether a new repository is private", needs=_UPLOADS, default_text="as the owner's are",
        changes_result=False, common=False)
    plan_only: bool = key(False, OUTPUT, "prepare the data, print the plan and stop", unset=False, changes_result=False)
    # fmt: on

    eval_metrics: ClassVar[tuple[str, ...]] = ("eval_loss",)  # the choices of metric_for_best_model
    contradictions: ClassVar[tuple[Contradiction, ...]] = (
        Contradiction(("bf16", "fp16"), lambda values: values["bf16"] and values["fp16"], "set one of them to false"),
        *(
            Contradiction(
                ("precision", name),
                lambda values, name=name: values["precision"] is not None and values[name],
                "say one of them: auto chooses by the device",
            )
            for name in ("bf16", "fp16")
        ),
        Contradiction(
            ("eval_strategy", "eval_steps"),
            lambda values: evaluates(values) and values["eval_strategy"] == "steps" and values["eval_steps"] is None,
            "say after how many steps, by eval_steps",
        ),
        Contradiction(
            ("report_to",),
            lambda values: len(values["report_to"]) > 1 and bool({"none", "all"} & set(values["report_to"])),
            "none and all stand alone",
        ),
        Contradiction(("lr_scheduler_kwargs", "lr_scheduler_type"), wrong_schedule_call),
        Contradiction(("optim_args", "optim"), wrong_optimiser_arguments),
        Contradiction(
            ("model_init", "tune"),
            lambda values: values["model_init"] == "random" and values["tune"] == "qlora",
            "only pretrained weights are quantised",
        ),
        *(
            Contradiction(
                (knob, "max_seq_length"),
                lambda values, knob=knob: values[knob] != "auto" and values[knob] < values["max_seq_length"],
                "a forward pass holds at least one row, so raise the first or lower the second",
            )
            for knob in ("microbatch_tokens", "eval_microbatch_tokens")
        ),
    )

    @classmethod
    def keys(cls) -> dict[str, Key]:
        """Every key of this kind of recipe by its name: its own, then the engine's."""
        metrics: Any = Literal[cls.eval_metrics]
        best = replace(ENGINE_KEYS["metric_for_best_model"], takes=metrics | None)
        return super().keys() | ENGINE_KEYS | {best.name: best}

    @property
    def training_arguments(self) -> dict[str, Any]:
        """The values for transformers.TrainingArguments, by its own names; without those that are None."""
        return {name: self.values[name] for name in ENGINE_KEYS if self.values[name] is not None}

    @property
    def mixed_precision(self) -> Literal["bf16", "fp16", "no"]:
        """Precision of matrix products, by accelerate's names: `no` is fp32."""
        return "bf16" if self.bf16 else "fp16" if self.fp16 else "no"

    @property
    def run_to_go_on_with(self) -> Path | None:
        """The folder of the run whose checkpoint `resume` leads to, there or not; None where the run begins anew."""
        if self.resume == RESUME_NEVER:
            return None
        return Path(self.output_dir) if self.resume == RESUME_NEWEST else run_of_checkpoint(Path(self.resume))

    @property
    def again(self) -> str:
        """What goes on with a run that was stopped, in words: the same command would begin anew by another `resume`."""
        return "the same command" if self.resume == RESUME_NEWEST else "--resume auto"

    def forward_tokens(self, knob: Literal["microbatch_tokens", "eval_microbatch_tokens"]) -> int:
        """The value of a knob in tokens; `auto`, where nobody has chosen yet, is one row."""
        value = self.values[knob]
        return value if isinstance(value, int) else self.max_seq_length

    def sums_exactly(self, *, plain_or_ddp: bool) -> bool:
        """Whether `exact_gradients` asks for integers: `auto` does where few parameters are trained."""
        if self.exact_gradients == "auto":
            return self.tune != "full" and plain_or_ddp
        return self.exact_gradients

    def result_values(self) -> dict[str, Any]:
        """As for every recipe; and when the run evaluates, where the best evaluation decides the model or the end.

        What earlier versions did without a key for it is left out, so that their runs go on.
        """
        values = super().result_values()
        if self.values["load_best_model_at_end"] or self.early_stopping_patience:
            values |= {name: value for name, value in self.resolved().items() if name in CHOOSES_THE_BEST}
        return {name: value for name, value in values.items() if UNSAID_BEFORE.get(name) != value}
