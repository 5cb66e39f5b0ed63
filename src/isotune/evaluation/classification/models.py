"""Opens a classifier: of a finished run, full or an adapter, or any other that transformers loads."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from isotune.data.classification.labels import ClassificationSettings
from isotune.evaluation.classification.tasks import ClassificationTask
from isotune.evaluation.named_model import check_named_model
from isotune.evaluation.tasks import read_task
from isotune.io.errors import UserError
from isotune.models.classifier import install_classification
from isotune.models.finished_run import (
    FinishedRun,
    add_run_adapter,
    is_classifier,
    load_run_base,
    load_run_tokenizer,
    load_whole_model,
    read_run,
)
from isotune.models.opening import load_pretrained, load_pretrained_config, load_pretrained_tokenizer
from isotune.models.packed_attention import max_positions

DEFAULT_MAX_SEQ_LENGTH = 512  # tokens of a document, for a model without a run


@dataclass(frozen=True)
class Classifier:
    """A model that is ready to classify.

    Attributes:
        name: the run's folder, or the model's folder or Hub id.
        model: installed for packed rows, in evaluation mode.
        settings: how texts become documents; `num_labels` is the model's.
        label_names: of the classes, None where the model has none.
        run: the finished run, None for any other model.
    """

    name: str
    model: Any
    tokenizer: Any
    settings: ClassificationSettings
    label_names: tuple[str, ...] | None
    run: FinishedRun | None = None

    @property
    def num_labels(self) -> int:
        """The number of classes."""
        return int(self.model.config.num_labels)


def load_run_classifier(run_dir: str | Path, device: torch.device, dtype: torch.dtype) -> Classifier:
    """The classifier of a finished run, full or an adapter on its base, with the settings of its training.

    Raises:
        UserError: no finished run, a run of another kind, or its model cannot be loaded.
    """
    run = read_run(run_dir)
    if run.is_adapter:
        if not is_classifier(run):
            raise UserError(f"{run.folder} is no run of a classifier: eval/generate.py evaluates a language model")
        base = load_run_base(run, device, dequantize=True)
        install_classification(base.to(dtype))
        model = add_run_adapter(run, base).to(dtype)
    else:
        _check_kind(run.model, str(run.folder))
        model = load_whole_model(run, dtype).to(device)
        install_classification(model)
    own = {f.name: run.settings[f.name] for f in fields(ClassificationSettings) if run.settings.get(f.name) is not None}
    settings = replace(ClassificationSettings(**own), num_labels=int(model.config.num_labels))
    names = settings.label_names or _names_of(model.config)
    return Classifier(str(run_dir), model.eval(), load_run_tokenizer(run), settings, names, run)


def load_model_classifier(name: str, device: torch.device, dtype: torch.dtype) -> Classifier:
    """Any classifier with weights in safetensors: a folder or a Hub id.

    Raises:
        UserError: it cannot be loaded, or is no classifier.
    """
    check_named_model(name)
    if Path(name).is_dir():
        _check_kind(Path(name), name)
    model = load_pretrained(name, auto=AutoModelForSequenceClassification, dtype=dtype).to(device).eval()
    if model.config.num_labels < 2:
        raise UserError(f"{name} has {model.config.num_labels} output: a classifier has at least two")
    tokenizer = load_pretrained_tokenizer(name)
    install_classification(model)
    longest = min(DEFAULT_MAX_SEQ_LENGTH, positions_of(model.config), tokenizer.model_max_length)
    settings = ClassificationSettings(max_seq_length=longest, num_labels=int(model.config.num_labels))
    return Classifier(name, model, tokenizer, settings, _names_of(model.config))


def task_of_run(
    classifier: Classifier, flags: Mapping[str, Any]
) -> tuple[ClassificationTask, tuple[float, int] | None]:
    """The evaluation data of a run's recipe, with flags that win; share and seed where it is held out of training.

    Raises:
        UserError: the run has no evaluation data.
    """
    assert classifier.run is not None
    recipe = classifier.run.settings
    columns = {key: recipe.get(key) for key in ("dataset_text_field", "dataset_label_field", "dataset_id_field")}
    name, split, held_out = recipe.get("eval_dataset_name"), recipe.get("eval_dataset_split"), None
    if name is None and recipe.get("eval_split_share"):
        name, split = recipe["dataset_name"], recipe["dataset_split"]
        held_out = (recipe["eval_split_share"], recipe["seed"])
    if name is None:
        raise UserError(f"the run {classifier.name} names no evaluation data: use --dataset_name or --task")
    given = {key: value for key, value in flags.items() if value is not None}
    own = {"dataset_name": name, "dataset_split": split, **columns}
    return read_task(ClassificationTask, None, {**own, **given}), held_out


def positions_of(config: Any) -> int:
    """The longest document that a model has positions for, in tokens."""
    return max_positions(config) or 2**31


def _check_kind(folder: Path, name: str) -> None:
    """Refuse another kind of model, which would load with a random head or fail with a traceback."""
    config = load_pretrained_config(str(folder))
    kinds = config.architectures or []
    if kinds and not any(kind.endswith("ForSequenceClassification") for kind in kinds):
        raise UserError(f"{name} holds a {kinds[0]}, not a classifier: eval/generate.py evaluates a language model")


def _names_of(config: Any) -> tuple[str, ...] | None:
    names = [str((config.id2label or {}).get(k, f"LABEL_{k}")) for k in range(config.num_labels)]
    return None if all(name == f"LABEL_{k}" for k, name in enumerate(names)) else tuple(names)
