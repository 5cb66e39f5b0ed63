"""Whether a base model that has a head already keeps it: only where it tells the same classes of texts apart.

The head of another task, such as that of token classification, may have the name and the size of the new one, and is
drawn anew all the same; what pretraining left, such as a pooler or ModernBERT's prediction head, goes on.

The classes of base and data are aligned by name. Numbers alone say nothing of what the old head was for, so a base with
names and data without, or the other way round, gets a new head.
"""

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from isotune.data.class_index import NameIndex, listed
from isotune.models.class_loss import PROBLEM_TYPES, task_type_of

# classes of models as pretraining leaves them; what others have beside the body was made for one task
_PRETRAINED = re.compile(r"Model$|LMHead|For(MaskedLM|PreTraining|CausalLM|ConditionalGeneration)$").search


def names_of(config: Any) -> tuple[str, ...] | None:
    """The names of a model's classes by number; None where it has no names of its own."""
    names = [str((config.id2label or {}).get(k, f"LABEL_{k}")) for k in range(config.num_labels)]
    return None if all(name == f"LABEL_{k}" for k, name in enumerate(names)) else tuple(names)


def set_names(
    config: Any, num_labels: int, names: tuple[str, ...] | list[str] | None, problem_type: str | None
) -> None:
    """Write the classes of a task into a model's configuration, over whatever the base was for."""
    config.num_labels = num_labels
    labels = list(names) if names else [f"LABEL_{k}" for k in range(num_labels)]
    config.id2label, config.label2id = dict(enumerate(labels)), {name: k for k, name in enumerate(labels)}
    config.problem_type = problem_type


def is_classifier(config: PreTrainedConfig) -> bool:
    """Whether the files of a configuration hold a classifier with its head."""
    return any(str(name).endswith("ForSequenceClassification") for name in config.architectures or ())


def other_task(config: PreTrainedConfig) -> str | None:
    """The class of a base whose files hold the head of a task that is not sequence classification; None for others."""
    named = [str(name) for name in config.architectures or ()]
    return next(
        (name for name in named if not name.endswith("ForSequenceClassification") and not _PRETRAINED(name)), None
    )


@dataclass(frozen=True)
class BaseHead:
    """What becomes of the head of a base model."""

    is_new: bool  # where a line says so too, whatever the files of the base hold of it
    order: list[int] | None = None  # by new class, the class of the base, where the head is kept in another order
    line: str | None = None  # for the user, where the base has a head

    @property
    def replaces(self) -> bool:
        """Whether the files of the base may hold weights under the names of the new head."""
        return self.is_new and self.line is not None

    @classmethod
    def of(cls, config: PreTrainedConfig, num_labels: int, names: Any, problem_type: str) -> "BaseHead":
        """Decide it by the configuration of the base, and the classes and kind of the new task."""
        if not is_classifier(config):
            task = other_task(config)
            return cls(True, None, None if task is None else f"new: the base is a {task}")
        theirs, kind = names_of(config), PROBLEM_TYPES[task_type_of(config)]
        was = f"the base tells {config.num_labels} classes without names apart"
        if kind == "regression":
            was = "the base predicts numbers"
        elif theirs is not None:
            was = f"the base tells {listed(theirs)} apart"
        if kind != problem_type:
            return cls(True, None, f"new: {was}" + (f", as {kind}" if kind != "regression" else ""))
        if kind == "regression" and config.num_labels == num_labels:
            return cls(False, None, f"of the base, which goes on: {was}, as the data")
        if config.num_labels != num_labels or (theirs is None) != (names is None):
            return cls(True, None, f"new: {was}, the data {listed(names) if names else f'{num_labels} without names'}")
        if theirs is None or names is None:
            return cls(False, None, f"of the base, which goes on: {was}, as the data")
        order = NameIndex(theirs).order_of(names)
        if order is None:
            return cls(True, None, f"new: {was}, the data {listed(names)}")
        in_order = order == list(range(num_labels))
        moved = "" if in_order else ", whose outputs are put in the order of the data"
        return cls(False, None if in_order else order, f"of the base, which goes on{moved}: {was}")


@torch.no_grad()
def draw_head(model: Any, seed: int) -> None:
    """Draw the layers of a classifier outside its body anew, as transformers draws those that are in no file."""
    torch.manual_seed(seed)
    spread = float(getattr(model.config, "initializer_range", 0.02))
    for module in _outside_the_body(model):
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=spread)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif (reset := getattr(module, "reset_parameters", None)) is not None:
            reset()


@torch.no_grad()
def reorder(model: Any, order: list[int]) -> None:
    """Put the outputs of a classifier's last layer into another order of classes."""
    layers = [module for module in _outside_the_body(model) if isinstance(module, nn.Linear)]
    last = [layer for layer in layers if layer.out_features == len(order)][-1]
    for parameter in (last.weight, last.bias):
        if parameter is not None:
            parameter.copy_(parameter[order].clone())


def _outside_the_body(model: Any) -> list[nn.Module]:
    body = {id(module) for module in model.base_model.modules()}
    return [module for module in model.modules() if id(module) not in body and module is not model]
