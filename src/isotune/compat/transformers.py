"""transformers 5.23: what its Trainer takes from other libraries and cannot be told otherwise."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
import transformers.trainer
from accelerate import skip_first_batches
from transformers import training_args


@runtime_checkable
class SkipsSteps(Protocol):
    """A loader that can leave out its first steps without laying them out."""

    def skipping(self, steps: int) -> Any:
        """This loader without the first `steps` of its next epoch."""


def _skip_first_batches(loader: Any, count: int) -> Any:
    return loader.skipping(count) if isinstance(loader, SkipsSteps) else skip_first_batches(loader, count)


def let_trainer_skip_steps() -> None:
    """Let a Trainer that resumes within an epoch skip steps of a loader of ours.

    It calls accelerate's `skip_first_batches`, which in 1.15 knows torch's DataLoader only.
    """
    transformers.trainer.skip_first_batches = _skip_first_batches  # type: ignore[attr-defined]  (not exported)


@contextmanager
def bf16_without_gpu() -> Iterator[None]:
    """Hold it around TrainingArguments with bf16.

    Without a GPU transformers 5.23 refuses bf16 unless `use_cpu` is set, which would drop DeepSpeed and FSDP.
    """
    library: Any = training_args
    is_available = library.is_torch_bf16_gpu_available
    if not torch.cuda.is_available():
        library.is_torch_bf16_gpu_available = lambda: True
    try:
        yield
    finally:
        library.is_torch_bf16_gpu_available = is_available
