"""The arguments of transformers.TrainingArguments that a recipe may set, with this project's defaults.

Written out rather than read from the library: reading a recipe then costs no import, and a new field of the library
is accepted only after somebody has looked at what it does here. A test holds this table to the installed library.
"""

import functools
from typing import Any, Literal

from isotune.config.schema import MEMORY, OPTIMISER, OUTPUT, POSITIVE, SCHEDULE, SHARE, Key, Range, Requirement, Values

# Schedules that follow evaluation metrics are left out: how often one evaluates would then change the weights.
# By schedule, what it takes in lr_scheduler_kwargs, which the engine would say only after minutes: names of which
# exactly one must be given, and names that may be given.
SCHEDULE_ARGUMENTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": ((), ()),
    "cosine": ((), ("num_cycles",)),
    "cosine_with_restarts": ((), ("num_cycles",)),
    "polynomial": ((), ("lr_end", "power")),
    "constant": ((), ()),
    "constant_with_warmup": ((), ()),
    "inverse_sqrt": ((), ("timescale",)),
    "cosine_with_min_lr": (("min_lr", "min_lr_rate"), ("num_cycles",)),
    "cosine_warmup_with_min_lr": (("min_lr", "min_lr_rate"), ("num_cycles", "warmup_lr_rate")),
    "warmup_stable_decay": (
        ("num_decay_steps",),
        ("num_stable_steps", "warmup_type", "decay_type", "min_lr_ratio", "num_cycles"),
    ),
}
# What each of these takes, and how a message says it; those of ENDS stay below learning_rate, which only falls.
_SHARE_BELOW_1: tuple[Range, str] = (Range(0, 1, high_open=True), "a share of learning_rate, from 0 and below 1,")
_STEPS: tuple[Range, str] = (Range(0, 1e12), "a number of steps")
_FORM: tuple[tuple[str, ...], str] = (("linear", "cosine", "1-sqrt"), "linear, cosine or 1-sqrt")
ENDS = ("lr_end", "min_lr")
SCHEDULE_VALUES: dict[str, tuple[Range | tuple[str, ...], str]] = {
    **dict.fromkeys(ENDS, (Range(0, 1000), "a number from 0 and below learning_rate")),
    **dict.fromkeys(("min_lr_rate", "min_lr_ratio"), _SHARE_BELOW_1),
    **dict.fromkeys(("num_decay_steps", "num_stable_steps"), _STEPS),
    **dict.fromkeys(("warmup_type", "decay_type"), _FORM),
    "warmup_lr_rate": (Range(0, 1), "a share of learning_rate, from 0 to 1,"),
    "num_cycles": (Range(0, 1e9), "a number of at least 0"),
    "power": (Range(0, 1e3), "a number of at least 0"),
    "timescale": (Range(0, 1e12, low_open=True), "a number above 0"),
}
Schedule: Any = Literal[tuple(SCHEDULE_ARGUMENTS)]
# Optimisers that update inside backward, or hold other weights in training than in evaluation, are left out.
Optimiser = Literal[
    "adamw_torch", "adamw_torch_fused", "adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit",
    "ademamix", "ademamix_8bit", "lion_8bit", "lion_32bit", "paged_lion_8bit", "paged_lion_32bit",
    "adafactor", "adagrad", "rmsprop", "sgd",
]  # fmt: skip
# By optimiser, what it takes in optim_args; transformers passes over every other name in silence.
_ADEMAMIX = ("beta1", "beta2", "beta3", "alpha", "eps", "t_alpha", "t_beta3")
OPTIMISER_ARGUMENTS: dict[str, tuple[str, ...]] = {
    "ademamix": _ADEMAMIX,
    "ademamix_8bit": _ADEMAMIX,
    "adagrad": ("lr_decay", "weight_decay", "eps"),
    "rmsprop": ("momentum", "alpha", "eps", "weight_decay", "centered"),
    "sgd": ("momentum", "dampening", "weight_decay", "nesterov"),
}
Tracker = Literal[
    "none", "all", "tensorboard", "wandb", "mlflow", "trackio", "swanlab", "comet_ml", "clearml", "neptune", "dvclive",
    "dagshub", "azure_ml", "codecarbon", "flyte", "kubeflow",
]  # fmt: skip
LogLevel = Literal["detail", "debug", "info", "warning", "error", "critical", "passive"]


def _has_evaluation_data(values: Values) -> bool:
    return values["eval_dataset_name"] is not None or bool(values.get("eval_split_share"))


def evaluates(values: Values) -> bool:
    """Whether the run evaluates while it trains."""
    return _has_evaluation_data(values) and values["eval_strategy"] != "no"


def wrong_schedule_call(values: Values) -> str | None:
    """What the schedule takes, where lr_scheduler_kwargs has a name that it does not take or lacks what it needs."""
    schedule = values["lr_scheduler_type"]
    needed, optional = SCHEDULE_ARGUMENTS[schedule]
    options: dict[str, Any] = values["lr_scheduler_kwargs"] or {}
    given = set(options)
    rate = values["learning_rate"]
    for name, value in {**({"lr_end": 1e-7} if schedule == "polynomial" else {}), **options}.items():
        takes, words = SCHEDULE_VALUES.get(name, ((), ""))
        if isinstance(takes, Range):
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            fits = is_number and value in takes and (name not in ENDS or not rate or value < rate)
        else:
            fits = value in takes
        if name in {*needed, *optional} and not fits:
            return f"{schedule} takes {words} for {name}"
    if given <= {*needed, *optional} and (not needed or len(given & set(needed)) == 1):
        return None
    parts = [f"needs {'one of ' if len(needed) > 1 else ''}{', '.join(needed)}"] if needed else []
    parts.append(f"takes {', '.join(optional)}" if optional else "takes no arguments")
    return f"{schedule} {' and '.join(parts)}"


def wrong_optimiser_arguments(values: Values) -> str | None:
    """What the optimiser takes, where optim_args has a name that it would pass over."""
    given = [part.partition("=")[0].strip() for part in (values["optim_args"] or "").split(",") if part.strip()]
    takes = OPTIMISER_ARGUMENTS.get(values["optim"], ())
    if set(given) <= set(takes):
        return None
    return f"{values['optim']} takes {', '.join(takes) if takes else 'no further arguments'}"


WITH_EVALUATION = Requirement(evaluates, "there is no evaluation without eval_dataset_name, nor with eval_strategy: no")
_EVAL_STRATEGY = Requirement(
    lambda values: _has_evaluation_data(values) or values["eval_strategy"] == "no",
    "there is no evaluation without eval_dataset_name",
)
_EVAL_STEPS = Requirement(
    lambda values: evaluates(values) and values["eval_strategy"] == "steps",
    "it needs eval_dataset_name and eval_strategy: steps",
)
_BETAS = Requirement(
    lambda values: any(name in values["optim"] for name in ("adam", "lion", "ademamix")), "optim has no betas"
)
_EPSILON = Requirement(
    lambda values: any(name in values["optim"] for name in ("adam", "ademamix")), "optim has no Adam epsilon"
)
_WARMUP = Requirement(
    lambda values: values["lr_scheduler_type"] != "constant",
    "lr_scheduler_type: constant has no warm-up (constant_with_warmup has)",
)
_SAVES = Requirement(lambda values: values["save_strategy"] != "no", "save_strategy is no")
_SAVES_BY_STEPS = Requirement(lambda values: values["save_strategy"] == "steps", "save_strategy is not steps")
_BEST = Requirement(
    lambda values: evaluates(values) and values["save_strategy"] != "no",
    "it needs eval_dataset_name, and a save_strategy and eval_strategy that are not no",
)
_BEST_METRIC = Requirement(
    lambda values: evaluates(values) and (values["save_strategy"] != "no" or bool(values["early_stopping_patience"])),
    "it needs eval_dataset_name, an eval_strategy that is not no, and a save_strategy or early_stopping_patience",
)
_BY_STEPS = Requirement(lambda values: values["logging_strategy"] == "steps", "logging_strategy is not steps")
_SPARSE_LOGGING = Requirement(
    lambda values: values["logging_strategy"] != "steps" or values["logging_steps"] != 1,
    "logging_steps: 1 logs every step",
)


_key, _rare = Key, functools.partial(Key, common=False)

_NEVER = 1e12  # by a number that no run reaches, recipes say never
_INTERVAL = Range(0, _NEVER, low_open=True)

_KEYS = (
    _key("lr_scheduler_type", Schedule, "linear", SCHEDULE, "how the learning rate falls"),
    _key("warmup_steps", float, 0, SCHEDULE, "steps of linear warm-up; below 1, a share of the run",
         allowed=Range(0), step_count=True, needs=_WARMUP),
    _rare("lr_scheduler_kwargs", dict[str, Any] | None, None, SCHEDULE, "further arguments of the scheduler"),
    _key("learning_rate", float, None, OPTIMISER, "highest learning rate", allowed=Range(0, 1000),
         default_from=lambda values: 2e-5 if values["tune"] == "full" else 2e-4,
         default_text="2e-4 for adapters, 2e-5 with tune: full"),
    _key("optim", Optimiser, "adamw_torch_fused", OPTIMISER, "optimiser"),
    _key("weight_decay", float, 0.0, OPTIMISER, "weight decay, not of biases and norms", allowed=Range(0)),
    _key("adam_beta1", float, 0.9, OPTIMISER, "decay of the first moment", allowed=SHARE, needs=_BETAS),
    _key("adam_beta2", float, 0.999, OPTIMISER, "decay of the second moment", allowed=SHARE, needs=_BETAS),
    _key("adam_epsilon", float, 1e-8, OPTIMISER, "Adam's epsilon", allowed=POSITIVE, needs=_EPSILON),
    _key("max_grad_norm", float, 1.0, OPTIMISER, "clip gradients to this norm; 0 clips nothing",
         allowed=Range(0, _NEVER)),
    _rare("optim_args", str | None, None, OPTIMISER, "further arguments of the optimiser, as name=value,name=value"),
    _key("gradient_checkpointing", bool, False, MEMORY, "recompute activations in backward: less memory, slower",
         changes_result=False),
    _rare("full_determinism", bool, False, MEMORY, "only deterministic kernels: slower"),
    _rare("ddp_bucket_cap_mb", int | None, None, MEMORY, "megabytes that DDP sends at once", allowed=Range(1),
          changes_result=False),
    _rare("ddp_timeout", int, 1800, MEMORY, "seconds without progress after which the processes stop",
          allowed=Range(1), changes_result=False),
    _rare("ddp_broadcast_buffers", bool | None, None, MEMORY, "DDP copies buffers from rank 0", changes_result=False),
    _key("eval_strategy", Literal["no", "steps", "epoch"] | None, None, OUTPUT, "when to evaluate",
         needs=_EVAL_STRATEGY, changes_result=False,
         default_from=lambda values: (
             "no" if not _has_evaluation_data(values) else "epoch" if values["eval_steps"] is None else "steps"),
         default_text="steps with eval_steps, else epoch; no without eval_dataset_name"),
    _key("eval_steps", float | None, None, OUTPUT, "steps between evaluations; below 1, a share of the run",
         allowed=_INTERVAL, step_count=True, needs=_EVAL_STEPS, changes_result=False),
    _rare("eval_delay", float, 0.0, OUTPUT, "epochs or steps before the first evaluation", allowed=Range(0),
          needs=WITH_EVALUATION, changes_result=False),
    _rare("eval_on_start", bool, False, OUTPUT, "evaluate before the first step", needs=WITH_EVALUATION,
          changes_result=False),
    _key("save_strategy", Literal["no", "steps", "epoch"], "steps", OUTPUT, "when to write a checkpoint",
         changes_result=False),
    _key("save_steps", float, 500, OUTPUT, "steps between checkpoints; below 1, a share of the run; the last step too",
         allowed=_INTERVAL, step_count=True, needs=_SAVES_BY_STEPS, changes_result=False),
    _key("save_total_limit", int, 2, OUTPUT, "checkpoints to keep, the best among them",
         allowed=Range(1), needs=_SAVES, changes_result=False),
    _key("load_best_model_at_end", bool, False, OUTPUT, "the final model is that of the best evaluation",
         needs=_BEST),
    _rare("metric_for_best_model", str | None, None, OUTPUT,
          "metric by which an evaluation is the best", needs=_BEST_METRIC, changes_result=False,
          default_from=lambda values: (
              "eval_loss" if values["load_best_model_at_end"] or values["early_stopping_patience"] else None),
          default_text="eval_loss with load_best_model_at_end or early_stopping_patience"),
    _key("logging_steps", float, 1, OUTPUT, "steps of a line of metrics.jsonl, and between two reports to the trackers",
         allowed=_INTERVAL, step_count=True, needs=_BY_STEPS, changes_result=False),
    _rare("logging_strategy", Literal["no", "steps", "epoch"], "steps", OUTPUT, "when to report to the trackers",
          changes_result=False),
    _rare("logging_first_step", bool, False, OUTPUT, "report the first step too", needs=_SPARSE_LOGGING,
          changes_result=False),
    _key("report_to", list[Tracker], ["none"], OUTPUT, "trackers: tensorboard, wandb, mlflow, ...; none; all",
         changes_result=False),
    _key("run_name", str | None, None, OUTPUT, "name of the run in trackers", changes_result=False),
    _key("disable_tqdm", bool, False, OUTPUT, "no progress bar", changes_result=False),
    _rare("log_level", LogLevel, "passive", OUTPUT, "log level of the main process", changes_result=False),
    _rare("log_level_replica", LogLevel, "warning", OUTPUT, "log level of the other processes", changes_result=False),
    _rare("log_on_each_node", bool, True, OUTPUT, "log on every node, not on the first only", changes_result=False),
    _rare("project", str, "huggingface", OUTPUT, "project's name in Trackio", changes_result=False),
    _rare("trackio_space_id", str | None, None, OUTPUT, "Space that Trackio logs to", changes_result=False),
    _rare("trackio_bucket_id", str | None, None, OUTPUT, "bucket behind a Trackio Space", changes_result=False),
    _rare("trackio_static_space_id", str | None, None, OUTPUT, "static Space of Trackio", changes_result=False),
)  # fmt: skip

# Keys that decide which evaluation is the best, or how many there are: the result may depend on them.
CHOOSES_THE_BEST = frozenset({"metric_for_best_model", "eval_strategy", "eval_steps", "eval_delay", "eval_on_start"})

ENGINE_KEYS = {key.name: key for key in _KEYS}
