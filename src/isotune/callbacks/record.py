"""What a script's run is, for its recipe.yaml and environment.json: arguments as given, data, guarantees."""

import hashlib
import os
import sys
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from isotune.compat.peft import base_model_of
from isotune.config.task_types import MULTI_LABEL
from isotune.drop_in import describe
from isotune.drop_in.evaluation import Laid
from isotune.drop_in.fields import given_fields
from isotune.io.run_files import SCRIPT
from isotune.models.class_loss import task_type_of
from isotune.report.run_record import BY_DEFAULT

HEAD = "# Written by a script of its own: a record of its arguments, and no recipe that could be run"
LABEL_COLUMNS = "label_columns"  # what the arguments call label_names, which in a recipe are those of the classes
PLAIN = (str, int, float, bool, type(None))


def script_name() -> str:
    """The file that this process runs."""
    return os.path.basename(sys.argv[0]) or "python"


def recipe_text(trainer: Any, names: Mapping[str, str | None]) -> str:
    """recipe.yaml of a script: what is trained, on `names` of data sets, by which arguments."""
    args, model = trainer.given_args, trainer.accelerator.unwrap_model(trainer.model)
    config = base_model_of(model).config
    what: dict[str, Any] = {
        SCRIPT: script_name(),
        "task": "sft" if trainer.causal else "classification",
        "model_name_or_path": config.name_or_path or f"a {type(base_model_of(model)).__name__} of the script",
        "tune": _tuned(model),
        **{key: name for key, name in names.items() if name is not None},
        "global_batch_size": trainer.global_batch_size,
    }
    if not trainer.causal:
        what |= {"num_labels": config.num_labels, "label_names": [config.id2label[n] for n in sorted(config.id2label)]}
        what["task_type"] = _task_type(config, trainer.plan.documents.targets)
    values = {name: _plain(value) for name, value in args.to_dict().items() if not name.endswith("_token")}
    values = {LABEL_COLUMNS if name == "label_names" else name: value for name, value in values.items()}
    if metric := values.get("metric_for_best_model"):  # under the name that the lines of an evaluation have
        values["metric_for_best_model"] = f"eval_{metric.removeprefix('eval_')}"
    given = {LABEL_COLUMNS if name == "label_names" else name for name in given_fields(args)}
    groups = {
        "Script": what,
        "Arguments that were given": {name: value for name, value in values.items() if name in given},
        BY_DEFAULT: {name: value for name, value in values.items() if name not in {*given, *what}},
    }
    parts = (f"# {title}\n{yaml.safe_dump(own, sort_keys=False, allow_unicode=True)}" for title, own in groups.items())
    return "\n".join([HEAD, *parts])


def data_counts(laid: Laid) -> dict[str, Any]:
    """What a data set was made into, in numbers."""
    documents = laid.documents
    counts: dict[str, Any] = {"rows": len(laid.rows), "documents": len(documents), "tokens": len(documents.input_ids)}
    if not documents.has_labels:
        counts["supervised_tokens"] = int(documents.supervised.sum())
    return counts


def data_fingerprint(laid: Laid) -> str:
    """SHA-256, in hexadecimal, of the tokens and targets in their order."""
    whole = hashlib.sha256()
    documents = laid.documents
    targets = documents.targets if laid.targets is None else laid.targets
    for array in (documents.input_ids, documents.starts, targets):
        whole.update(str((array.dtype, array.shape)).encode())
        whole.update(array.tobytes())
    return whole.hexdigest()


def guarantees(trainer: Any) -> list[str]:
    """The lines of `isotune.describe`."""
    return [" ".join(line.split()) for line in describe(trainer).splitlines()]


def _task_type(config: Any, targets: Any) -> str:
    """What a classifier learns: as its configuration says, else by the form of its targets, as the library does."""
    if config.problem_type is None and config.num_labels > 1 and targets is not None and targets.ndim > 1:
        return MULTI_LABEL
    return task_type_of(config)


def _tuned(model: Any) -> str:
    if not hasattr(model, "peft_config"):
        return "full"
    return "qlora" if getattr(base_model_of(model), "is_loaded_in_4bit", False) else "lora"


def _plain(value: Any) -> Any:
    """A value that YAML's safe form holds."""
    if isinstance(value, Enum):
        return _plain(value.value)
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(each) for each in value]
    return value if type(value) in PLAIN else str(value) if isinstance(value, Path) else repr(value)
