"""What becomes of every field of TrainingArguments and SFTConfig in a drop-in trainer (transformers 5.23, trl 1.16).

docs/drop-in.md has the table of it, which `python -m tests.drop_in_table` writes.
"""

from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig
from trl.trainer.sft_config import SFTConfig

HONOURED, REFUSED, NOT_EXACT, NO_EFFECT = "honoured", "refused", "not exact", "no effect"


@dataclass(frozen=True)
class Verdict:
    """What becomes of a field.

    Attributes:
        here: one of the four words above; of a field that is honoured the note names the values that are refused.
        note: how, or why not.
        value: what is refused, of a field that is: anything true, or one value.
    """

    here: str
    note: str = ""
    value: Any = None


def _refused(note: str, value: Any = True) -> Verdict:
    return Verdict(REFUSED, note, value)


_EXACT_LOSS = "the loss is always over the global batch of all processes"
_ANY_BATCH = "an evaluation gives the same numbers with any batch: `microbatch_tokens` is what one forward pass takes"
_PREPARED = "rows are laid out in the training process, from arrays"
_OF_SCRIPT = "as in the library: for the script to read"
_COMPILED = "kernels are chosen by shapes, which differ between launches"
_TRAINING_PRECISION = "an evaluation has the precision of training"
_AS_IN_LIBRARY = (
    *("output_dir", "num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs"),
    *("warmup_steps", "optim_args", "optim_target_modules", "weight_decay", "adam_beta1", "adam_beta2"),
    *("adam_epsilon", "bf16", "fp16", "tf32", "activation_checkpointing", "activation_checkpointing_kwargs"),
    *("gradient_checkpointing", "gradient_checkpointing_kwargs", "use_cache", "logging_strategy", "logging_steps"),
    *("logging_first_step", "log_on_each_node", "log_level", "log_level_replica", "disable_tqdm", "report_to"),
    *("run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "eval_strategy"),
    *("eval_steps", "eval_delay", "prediction_loss_only", "eval_on_start", "save_only_model", "save_strategy"),
    *("save_steps", "save_on_each_node", "save_total_limit", "enable_jit_checkpoint", "push_to_hub", "hub_token"),
    *("hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision", "load_best_model_at_end"),
    *("greater_is_better", "ignore_data_skip", "restore_callback_states_from_checkpoint", "full_determinism", "seed"),
    *("use_cpu", "remove_unused_columns", "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers"),
    *("ddp_backend", "ddp_timeout", "deepspeed", "debug", "skip_memory_metrics", "local_rank"),
    # of SFTConfig
    *("model_init_kwargs", "trust_remote_code", "chat_template_path", "dataset_text_field", "dataset_kwargs"),
    *("dataset_num_proc", "eos_token", "max_length", "truncation_mode", "shuffle_dataset", "completion_only_loss"),
    *("assistant_only_loss", "pad_token"),
)

FIELDS: dict[str, Verdict] = dict.fromkeys(_AS_IN_LIBRARY, Verdict(HONOURED)) | {
    # what an update sees
    "per_device_train_batch_size": Verdict(
        HONOURED,
        "x `gradient_accumulation_steps` x processes are the rows of an update; `global_batch_size=` pins them",
    ),
    "gradient_accumulation_steps": Verdict(
        HONOURED, "as rows of an update; callbacks see 1, and `on_substep_end` is not called"
    ),
    "accelerator_config": Verdict(
        HONOURED, "with `split_batches` a batch is that of all processes; its other keys of loaders have no effect"
    ),
    "data_seed": Verdict(HONOURED, "shuffles, in an order of the schedule's own"),
    "train_sampling_strategy": Verdict(
        HONOURED, "`sequential`, and `random`; any other shuffles, which a line says: nothing is padded"
    ),
    "length_column_name": Verdict(NO_EFFECT, "nothing is padded"),
    "average_tokens_across_devices": Verdict(NO_EFFECT, _EXACT_LOSS),
    "dataloader_drop_last": _refused("nothing is dropped, the last update of an epoch is smaller"),
    **dict.fromkeys(
        [
            *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
            *("dataloader_prefetch_factor", "dataloader_multiprocessing_context", "dataloader_in_order"),
        ],
        Verdict(NO_EFFECT, _PREPARED),
    ),
    "auto_find_batch_size": _refused("changes what a device holds: say microbatch_tokens"),
    "torch_empty_cache_steps": Verdict(NO_EFFECT, "lower `microbatch_tokens` where memory runs out"),
    # the loss and its gradient
    "label_smoothing_factor": Verdict(HONOURED, "over the global batch; a classifier's evaluation has none"),
    "label_names": Verdict(HONOURED, "the column of the labels"),
    "loss_type": Verdict(HONOURED, "over the global batch"),
    "max_grad_norm": Verdict(HONOURED, "the norm is that of the global batch"),
    "neftune_noise_alpha": Verdict(
        HONOURED, "by the document: noise of its own, of at most alpha / sqrt(its tokens x embedding size)"
    ),
    "router_aux_loss_coef": _refused(
        "the routers' balancing loss is a mean of microbatches; without a number a line says that it is left out"
    ),
    "logging_nan_inf_filter": Verdict(NO_EFFECT, "a loss that is NaN or Inf stops the training, and names its rows"),
    "include_num_input_tokens_seen": Verdict(HONOURED, "`all` and `non_padding` are the same: nothing is padded"),
    "optim": Verdict(
        HONOURED,
        "`schedule_free_*` and `*lomo` need a loop that calls them, `*_layerwise` updates in the backward of each "
        "microbatch: refused",
    ),
    "activation_offloading": _refused("it wraps a step of the library, which is not run"),
    "use_liger_kernel": _refused("its loss and layers replace those that keep documents apart"),
    "liger_kernel_config": Verdict(NO_EFFECT, "of `use_liger_kernel`"),
    **dict.fromkeys(("torch_compile", "torch_compile_backend", "torch_compile_mode"), Verdict(NOT_EXACT, _COMPILED)),
    # evaluation
    **dict.fromkeys(
        ("per_device_eval_batch_size", "eval_accumulation_steps", "eval_use_gather_object"),
        Verdict(NO_EFFECT, _ANY_BATCH),
    ),
    "eval_do_concat_batches": _refused("there is one table of predictions, with one line a row", value=False),
    "batch_eval_metrics": _refused("metrics are computed once, of all predictions"),
    "include_for_metrics": Verdict(HONOURED, "`inputs`; `loss` is refused: there is one loss of all rows"),
    "bf16_full_eval": _refused(_TRAINING_PRECISION),
    "fp16_full_eval": _refused(_TRAINING_PRECISION),
    "metric_for_best_model": Verdict(
        HONOURED, "`eval_loss` and metrics of your own; those of TRL's step (`eval_mean_token_accuracy`) are refused"
    ),
    # engines
    "fsdp": Verdict(HONOURED, "FSDP2; version 1 is refused"),
    "fsdp_config": Verdict(HONOURED, "of FSDP2"),
    "ddp_static_graph": _refused("a rank may run an empty microbatch, so the graph is not static"),
    "parallelism_config": _refused("every process has documents of its own, and no part of the same ones"),
    # what TRL does with rows
    "packing": Verdict(HONOURED, "documents of a row do not see each other, on any attention"),
    "packing_strategy": Verdict(
        HONOURED,
        "`bfd`; `wrapped` is refused: rows would see each other, and `bfd_split`: split long rows in the dataset",
    ),
    "eval_packing": Verdict(NO_EFFECT, _ANY_BATCH),
    "padding_free": Verdict(NO_EFFECT, "nothing is padded, or only inside a model that needs it"),
    "pad_to_multiple_of": Verdict(NO_EFFECT, "nothing is padded"),
    # what scripts read
    **dict.fromkeys(("do_train", "do_eval", "do_predict", "resume_from_checkpoint"), Verdict(HONOURED, _OF_SCRIPT)),
}


def library_fields() -> dict[str, Field]:
    """Every field of the installed libraries' arguments by its name, with the default of the class that has it last."""
    return {own.name: own for kind in (TrainingArguments, SFTConfig) for own in fields(kind)}


def owner_of(name: str) -> str:
    """The class that brings a field: SFTConfig has those of TrainingArguments too."""
    known = {own.name for own in fields(TrainingArguments)}
    return "TrainingArguments" if name in known else "SFTConfig"


def without_effect(args: Any) -> list[str]:
    """The names of the fields that were given and change nothing here."""
    return [name for name in given_fields(args) if name in FIELDS and FIELDS[name].here == NO_EFFECT]


def unknown(args: Any) -> list[str]:
    """The names of the fields that were given and that a later release of the libraries has brought."""
    of_library = library_fields()
    return [name for name in given_fields(args) if name in of_library and name not in FIELDS]


def given_fields(args: Any) -> list[str]:
    """The names of the fields whose value is neither the default of their class nor what the library makes of it."""
    return [own.name for own in fields(args) if not _is_default(own, getattr(args, own.name), args)]


def _is_default(own: Field, value: Any, args: Any) -> bool:
    default = own.default if own.default_factory is MISSING else own.default_factory()
    if value == default:
        return True
    if own.name in _MADE:
        return bool(_MADE[own.name](value, args))
    return default in (None, "", "none") and (value is False or value == [])


# whether a value that is not the default is what the library makes of the other fields
_MADE: dict[str, Callable[[Any, Any], Any]] = {
    "accelerator_config": lambda value, _: isinstance(value, AcceleratorConfig) and value == AcceleratorConfig(),
    "activation_checkpointing": lambda value, args: value == type(args).gradient_checkpointing,
    "bf16": lambda value, args: value and not args.fp16 and isinstance(args, SFTConfig),
    "dataloader_pin_memory": lambda value, args: args.use_cpu and not value,
    "do_eval": lambda value, args: value and args.eval_strategy != "no",
    "eval_steps": lambda value, args: args.eval_strategy == "steps" and value == args.logging_steps,
    "greater_is_better": lambda value, args: value == (not str(args.metric_for_best_model).endswith("loss")),
    "metric_for_best_model": lambda value, args: args.load_best_model_at_end and value == "loss",
    "pad_to_multiple_of": lambda value, _: value is None,
    "torch_compile_backend": lambda value, args: args.torch_compile and value == "inductor",
}
