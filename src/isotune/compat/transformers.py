"""transformers 5.23: what has no public accessor, and what its Trainer cannot be told otherwise."""

import functools
import importlib
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedConfig


def attention_of(config: PreTrainedConfig) -> str | None:
    """Name of the attention implementation in effect; the public argument `attn_implementation` cannot be read back."""
    return config._attn_implementation


def set_attention_of(config: PreTrainedConfig, name: str) -> None:
    """Set the attention implementation of a configuration whose model does not exist yet."""
    config._attn_implementation = name


def lets_attention_be_replaced(model: Any) -> bool:
    """Whether the model class calls AttentionInterface; `set_attn_implementation` does not raise where it does not."""
    return getattr(model, "_supports_attention_backend", False)


@functools.cache
def weights_read_alone(kind: type[torch.nn.Module]) -> frozenset[str]:
    """Names of the layers of a block whose weight its code reads, as `self.out_proj.weight`, beside calling the layer.

    Mamba's kernels on a GPU take such weights as arguments, and so pass by what an adapter adds to the layer.
    """
    try:
        code = inspect.getsource(kind)
    except (OSError, TypeError):
        return frozenset()
    return frozenset(re.findall(r"\bself\.(\w+)\.weight\b(?!\.(?:device|dtype|shape)\b)", code))


def set_sharded_classes(model: Any, names: Sequence[str]) -> None:
    """Name the module classes that accelerate wraps one by one under FSDP2; it reads this class attribute alone."""
    model._no_split_modules = list(names)


def ignored_on_save(model: Any) -> set[str]:
    """State dict keys that `save_pretrained` leaves out."""
    return set(getattr(model, "_keys_to_ignore_on_save", None) or ())


def messages_for_template(messages: Sequence[Any]) -> list[Any]:
    """Messages as `apply_chat_template` hands them to a template: since 5.21 with every name of their reasoning."""
    from transformers.utils import chat_template_utils

    with_every_name = getattr(chat_template_utils, "_alias_reasoning_fields", list)
    return with_every_name(messages)


def let_trainer_skip_steps() -> None:
    """Let a Trainer that resumes within an epoch skip steps of a loader that has `skipping(steps)`, ours.

    It calls accelerate's `skip_first_batches`, which in 1.15 knows torch's DataLoader only.
    """
    import transformers.trainer as library
    from accelerate import skip_first_batches

    def skip(loader: Any, count: int) -> Any:
        return loader.skipping(count) if hasattr(loader, "skipping") else skip_first_batches(loader, count)

    library.skip_first_batches = skip  # type: ignore[attr-defined]  (not exported)


def look_for_no_documents(known: Callable[[], bool]) -> None:
    """Let models look for the documents of a packed row in its position ids only where `known` is false.

    5.23 looks once a forward and waits for the device to know what it found, for a mask that `packed` does not make.
    """
    from transformers import masking_utils

    library: Any = masking_utils
    stock = getattr(library, "find_packed_sequence_indices", None)
    if stock is None:  # another version, which may look elsewhere
        return
    library.find_packed_sequence_indices = lambda position_ids: None if known() else stock(position_ids)


def loss_device(trainer: Any) -> torch.device:
    """Where a Trainer adds up the losses of its steps: on the host from now on, where ours are, the same on every rank.

    5.23 adds them on the device, and to log one it gathers it over the ranks and waits for the device, each step. The
    sum is a private attribute, made anew by each `train`; where there is none the losses stay on the device.
    """
    library: Any = importlib.import_module("transformers.trainer")
    if not hasattr(trainer, "_tr_loss"):
        return trainer.args.device
    trainer._tr_loss = trainer._tr_loss.cpu()
    trainer._tr_loss.isotune = True  # a mark: the sums of other trainers of this process are gathered
    if getattr(library.nested_gather, "isotune", False):
        return trainer._tr_loss.device
    stock = library.nested_gather

    def gather(tensors: Any, *options: Any, **more: Any) -> Any:
        return tensors if getattr(tensors, "isotune", False) else stock(tensors, *options, **more)

    gather.isotune = True  # type: ignore[attr-defined]  (a mark: it is wrapped once)
    library.nested_gather = gather
    return trainer._tr_loss.device


def checkpoints_reentrantly(args: Any, model: torch.nn.Module) -> bool:
    """Whether activations are computed again by torch's reentrant checkpoint, whose first forward has no graph.

    5.23 hands a model's arguments to torch in a private attribute of its layers; torch's own default is reentrant.
    """
    asked = getattr(args, "activation_checkpointing_kwargs", None)
    if asked is not None and asked.get("use_reentrant", True):
        return True
    enabled = (getattr(module, "_gradient_checkpointing_func", None) for module in model.modules())
    return any(found is not None and getattr(found, "keywords", {}).get("use_reentrant", True) for found in enabled)


@contextmanager
def bf16_without_gpu() -> Iterator[None]:
    """Hold it around TrainingArguments with bf16.

    Without a GPU transformers 5.23 refuses bf16 unless `use_cpu` is set, which would drop DeepSpeed and FSDP.
    """
    from transformers import training_args

    library: Any = training_args
    is_available = library.is_torch_bf16_gpu_available
    if not torch.cuda.is_available():
        library.is_torch_bf16_gpu_available = lambda: True
    try:
        yield
    finally:
        library.is_torch_bf16_gpu_available = is_available


def use_one_gpu(arguments: Any) -> None:
    """Let a process use its own GPU alone, however many there are: Trainer would wrap the model in nn.DataParallel.

    That would scatter packed rows over the devices. `n_gpu` has no setter.
    """
    arguments._n_gpu = min(arguments.n_gpu, 1)


def items_in_batch(trainer: Any, batch: dict[str, Any]) -> Any:
    """What Trainer hands to a loss as `num_items_in_batch` for this batch: int64 [], or None."""
    return trainer._get_num_items_in_batch([batch], trainer.args.device)


def note_best_metric(trainer: Any, metrics: dict[str, float]) -> None:
    """Remember an evaluation in the Trainer's state where it is the best so far, as Trainer does after a step."""
    trainer._determine_best_metric(metrics, None)
