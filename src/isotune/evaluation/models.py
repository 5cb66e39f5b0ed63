"""Opens a model to evaluate: of a finished run, full or an adapter, or any other that transformers loads.

Whatever cannot be opened, or is of another kind, is a UserError of one sentence.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from isotune.config.mixture import mixture_name
from isotune.config.task_types import MULTI_LABEL, REGRESSION
from isotune.data.classification.labels import ClassificationSettings
from isotune.data.classification.thresholds import THRESHOLD, Thresholds, read_thresholds
from isotune.data.mixture import EVALUATED, evaluation_columns
from isotune.data.sft.tokenization import ConversationEncoder
from isotune.data.sources.hub import is_hub_id
from isotune.distributed.device import choose_device
from isotune.evaluation.distributed_eval import Shards
from isotune.evaluation.tasks import ROW_COLUMNS, ClassificationTask, read_task
from isotune.io.errors import UserError
from isotune.io.shipped import script
from isotune.models.base.ending import eos_ids_of
from isotune.models.base.folder import why_no_model
from isotune.models.base.head import names_of
from isotune.models.base.vocabulary import check_tokens
from isotune.models.class_loss import task_type_of
from isotune.models.classifier import check_first_token, fit_tokenizer, install_classification
from isotune.models.finished_run import (
    FinishedRun,
    add_run_adapter,
    is_classifier,
    load_run_base,
    load_run_model,
    load_run_tokenizer,
    load_whole_model,
    read_run,
)
from isotune.models.opening import load_pretrained, load_pretrained_config, load_pretrained_tokenizer
from isotune.models.packed_attention import max_positions

DEFAULT_MAX_SEQ_LENGTH = 512  # tokens of a document, for a classifier without a run


@dataclass(frozen=True)
class Classifier:
    """A model that is installed for packed rows, in evaluation mode."""

    name: str  # the run's folder, or the model's folder or Hub id
    model: Any
    tokenizer: Any
    settings: ClassificationSettings  # how texts become documents; `num_labels` and `task_type` are the model's
    label_names: tuple[str, ...] | None  # of the classes, None where the model has none
    run: FinishedRun | None = None  # the finished run, None for any other model
    thresholds: Thresholds = THRESHOLD  # from which a text has a label, of multi_label

    @property
    def num_labels(self) -> int:
        """The number of classes or labels; 1 of a regression."""
        return int(self.model.config.num_labels)

    @property
    def task_type(self) -> str:
        """What kind of labels it predicts."""
        return self.settings.task_type

    @property
    def device(self) -> torch.device:
        """The device of its inputs."""
        return next(self.model.parameters()).device


@dataclass(frozen=True)
class GenerationModel:
    """A causal language model with its own tokenizer; under ZeRO-3 the shard of this rank, with its engine."""

    model: Any
    tokenizer: Any  # whose chat template says how the model is asked; without one, in Guanaco's form
    engine: Any = None

    @cached_property
    def encoder(self) -> ConversationEncoder:
        """Makes the tokens of a question, as they stand before its answer in training."""
        return ConversationEncoder(self.tokenizer)

    @property
    def is_sharded(self) -> bool:
        """Whether every rank must take part in every forward."""
        return self.engine is not None

    @property
    def device(self) -> torch.device:
        """The device of its inputs."""
        return self.model.device

    @property
    def positions(self) -> int:
        """The longest sequence of the model in tokens; the tokenizer's limit where the model has none."""
        return self.tokenizer.model_max_length if self.last_position is None else self.last_position + 1

    @property
    def last_position(self) -> int | None:
        """The last position that the model has an embedding for; None where there is no limit."""
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return positions - 1 if positions is not None and positions > 0 else None

    @property
    def eos_ids(self) -> set[int]:
        """Every token that ends an answer: see `models/base/ending.py`."""
        ids = eos_ids_of(self.model, self.encoder)
        if not ids:
            raise UserError(f"the tokenizer {self.tokenizer.name_or_path} has no eos token: generation could not end")
        return ids

    def token_count(self, prompt: str) -> int:
        """Tokens of a prompt as `encoder.prompt` writes it, special ones included."""
        return len(self.encoder.prompt_tokens(prompt))


def load_run_classifier(run_dir: str | Path, device: torch.device, dtype: torch.dtype) -> Classifier:
    """The classifier of a finished run, full or an adapter on its base, with the settings of its training."""
    run = read_run(run_dir)
    tokenizer = load_run_tokenizer(run)
    if run.is_adapter:
        if not is_classifier(run):
            raise UserError(
                f"{run.folder} is no run of a classifier: {script('eval/generate.py')} evaluates a language model"
            )
        base = load_run_base(run, device, dequantize=True)
        fit_tokenizer(base, install_classification(base.to(dtype)), tokenizer)
        model = add_run_adapter(run, base).to(dtype)
    else:
        _check_kind(run.model, str(run.folder))
        model = load_whole_model(run, dtype).to(device)
        install_classification(model)
    own = {f.name: run.settings[f.name] for f in fields(ClassificationSettings) if run.settings.get(f.name) is not None}
    if "label_names" in own:
        own["label_names"] = tuple(own["label_names"])
    settings = ClassificationSettings(**own)
    settings = _of_model(settings, model.config, settings.known_names or names_of(model.config))
    names = settings.label_names
    thresholds = _thresholds(run.model, settings)
    return Classifier(str(run_dir), model.eval(), tokenizer, settings, names, run, thresholds)


def load_model_classifier(name: str, device: torch.device, dtype: torch.dtype) -> Classifier:
    """Any classifier with weights in safetensors: a folder or a Hub id."""
    _check_named_model(name)
    if Path(name).is_dir():
        _check_kind(Path(name), name)
    model = load_pretrained(name, auto=AutoModelForSequenceClassification, dtype=dtype).to(device).eval()
    tokenizer = load_pretrained_tokenizer(name)
    check_tokens(model.config, tokenizer, name)
    check_first_token(model, install_classification(model), tokenizer)
    positions = max_positions(model.config) or DEFAULT_MAX_SEQ_LENGTH
    longest = min(DEFAULT_MAX_SEQ_LENGTH, positions, tokenizer.model_max_length)
    settings = _of_model(ClassificationSettings(max_seq_length=longest), model.config, names_of(model.config))
    thresholds = _thresholds(Path(name), settings)
    return Classifier(name, model, tokenizer, settings, settings.label_names, thresholds=thresholds)


def _thresholds(model: Path, settings: ClassificationSettings) -> Thresholds:
    """Those that a model's folder keeps, of multi_label."""
    if settings.task_type != MULTI_LABEL:
        return THRESHOLD
    return read_thresholds(model, settings.label_names or list(map(str, range(settings.num_labels or 0))))


def _of_model(settings: ClassificationSettings, config: Any, names: tuple[str, ...] | None) -> ClassificationSettings:
    """The settings with the kind, number and names of what a model predicts; a regression has neither of the two."""
    task_type: Any = task_type_of(config)
    if task_type == REGRESSION:
        return replace(settings, task_type=task_type, num_labels=None, label_names=None)
    return replace(settings, task_type=task_type, num_labels=int(config.num_labels), label_names=names)


def task_of_run(
    classifier: Classifier, flags: Mapping[str, Any]
) -> tuple[ClassificationTask, tuple[float, int] | None]:
    """The evaluation data of a run's recipe, with flags that win; share and seed where it is held out of training."""
    assert classifier.run is not None
    recipe = classifier.run.settings
    columns = {
        key: recipe.get(key)
        for key in (
            "dataset_text_field",
            "dataset_text_pair_field",
            "dataset_label_field",
            "dataset_id_field",
        )
    }
    columns["dataset_columns"] = evaluation_columns(recipe.get("dataset_columns"))
    if recipe.get("label_source", "column") != "column":  # a column of classes that flags name is one to read
        columns["dataset_label_field"] = None
    name, split, held_out = recipe.get("eval_dataset_name"), recipe.get("eval_dataset_split"), None
    mixture, mixture_split = recipe.get("eval_dataset_mixture"), EVALUATED
    if name is None and recipe.get("eval_split_share"):
        mixture_split = "train"
        name, split = recipe.get("dataset_name"), recipe.get("dataset_split")
        mixture = recipe.get("dataset_mixture")
        held_out = (recipe["eval_split_share"], recipe["seed"])
    if name is None and mixture is None:
        raise UserError(f"the run {classifier.name} names no evaluation data: use --dataset_name or --task")
    own: dict[str, Any] = {"dataset_name": name, "dataset_split": split, **columns}
    given = {key: value for key, value in flags.items() if value is not None}
    prefix = "dataset" if held_out else "eval_dataset"
    own |= {f"dataset_{key}": recipe.get(f"{prefix}_{key}") for key in ("config", "revision")}
    parts, whose = ("dataset_split", "dataset_config", "dataset_revision"), "several data sets"
    if mixture is not None:
        split_of = [{"dataset_split": mixture_split, **entry} for entry in mixture]
        own |= {"dataset_name": mixture_name(mixture), "dataset_mixture": split_of, "mixture_seed": recipe["seed"]}
        others = [key for key in (*parts, "dataset_columns") if key in given]
    else:
        whose = f"the share of {name} that it was not trained on"
        others = [key for key in parts if held_out and key in given and given[key] != own[key]]
    if others:
        named = f"--{others[0]} {given[others[0]]}"
        raise UserError(f"{named} needs --dataset_name: {classifier.name} is evaluated on {whose}")
    return read_task(ClassificationTask, None, {**own, **given}), held_out


def data_of_run(run_dir: str, dataset_name: str | None) -> dict[str, Any]:
    """What else a run's recipe says of the data `dataset_name`, where it is of that recipe.

    That are the columns of its conversations, the configuration and the revision.
    """
    recipe = read_run(run_dir).settings
    prefix = next((own for own in ("eval_dataset", "dataset") if recipe.get(f"{own}_name") == dataset_name), None)
    if prefix is None:
        return {}
    columns = {key: recipe.get(key) for key in ROW_COLUMNS}
    columns["dataset_columns"] = evaluation_columns(recipe.get("dataset_columns"))
    return columns | {f"dataset_{key}": recipe.get(f"{prefix}_{key}") for key in ("config", "revision")}


def generation_model_of_run(
    run_dir: str | Path, device: torch.device | None = None, shards: Shards | None = None
) -> GenerationModel:
    """A finished run's model, full or an adapter on its base; on a GPU where there is one, unless `device` says else.

    With `shards` it is sharded over all ranks. A 4-bit base is whole on each of them all the same.
    """
    run = read_run(run_dir)
    shards = None if run.settings.get("tune") == "qlora" else shards
    stored = run.training_dtype if run.is_adapter and not run.base_made_here else _stored_dtype(run.base or run.model)
    announced = shards.announce(stored) if shards else None
    model = load_run_model(run, device or _best_device())
    del announced
    # peft's layers stay inside the model that they adapt
    return _generation_model(model.get_base_model() if run.is_adapter else model, load_run_tokenizer(run), shards)


def generation_model_named(
    name: str, device: torch.device | None = None, shards: Shards | None = None
) -> GenerationModel:
    """Any causal model with weights in safetensors, a folder or a Hub id; otherwise as `generation_model_of_run`."""
    _check_named_model(name)
    announced = shards.announce(_stored_dtype(name)) if shards else None
    model = load_pretrained(name, auto=AutoModelForCausalLM, dtype="auto").to(device or _best_device()).eval()
    del announced
    return _generation_model(model, load_pretrained_tokenizer(name), shards)


def _generation_model(model: Any, tokenizer: Any, shards: Shards | None) -> GenerationModel:
    check_tokens(model.config, tokenizer, model.name_or_path)
    if shards is None:
        return GenerationModel(model, tokenizer)
    engine = shards.spread(model)
    return GenerationModel(engine.module, tokenizer, engine)


def _best_device() -> torch.device:
    return torch.device(choose_device())


def _stored_dtype(name: str | Path) -> torch.dtype:
    """The dtype of a model's weights, from its configuration."""
    stored: Any = load_pretrained_config(str(name)).dtype
    return stored or torch.float32


def _check_named_model(name: str) -> None:
    """Refuse what --model cannot open: an adapter without its base, or neither a folder nor a Hub id."""
    if why := why_no_model(name):
        raise UserError(f"--model {why}; a run is given with --run_dir")
    if not Path(name).is_dir() and not is_hub_id(name):
        raise UserError(f"there is no model folder {name}")


def _check_kind(folder: Path, name: str) -> None:
    """Refuse another kind of model, which would load with a random head or fail with a traceback."""
    kinds = load_pretrained_config(str(folder)).architectures or []
    if kinds and not any(kind.endswith("ForSequenceClassification") for kind in kinds):
        raise UserError(
            f"{name} holds a {kinds[0]}, not a classifier: {script('eval/generate.py')} evaluates a language model"
        )
