"""RUN/model/README.md: the model card, with every number read from the run's own files.

The metadata are huggingface_hub's ModelCardData, from which the Hub shows base model, data and results. The text
describes the run and how to load the model. Of local paths only the last part appears: the card may be uploaded.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from isotune.config.mixture import mixture_name
from isotune.config.recipes import task_of
from isotune.config.task_types import MULTI_LABEL, is_higher_better
from isotune.data.sources.hub import is_hub_id
from isotune.io.errors import UserError, first_line
from isotune.io.files import replace_file
from isotune.io.run_files import SCRIPT
from isotune.models.class_loss import PROBLEM_TYPES
from isotune.models.finished_run import read_run
from isotune.models.layouts.heads import head_of
from isotune.models.opening import load_pretrained_config, skip_patterns
from isotune.report.formatting import format_number
from isotune.report.markdown import fenced, inline, python_text, table
from isotune.report.run_record import BY_DEFAULT, RunRecord, read_record, run_tables
from isotune.run.identity import MIXTURES
from isotune.run.step_lines import steps_in_words

CARD, TEMPLATE = "README.md", Path(__file__).with_name("model_card.md.jinja")
# the Hub's name of each metric of an evaluation line
METRICS = {
    "eval_accuracy": "accuracy",
    "eval_f1_micro": "f1",
    "eval_f1_macro": "f1",
    "eval_exact_match": "exact_match",
    "eval_pearson": "pearsonr",
    "eval_spearman": "spearmanr",
    "eval_mean_absolute_error": "mae",
    "eval_r2": "r_squared",
    "eval_loss": "loss",
    "eval_perplexity": "perplexity",
}
PATH_KEYS = ("model_name_or_path", "tokenizer_name_or_path", "dataset_name", "eval_dataset_name")
OMITTED_GROUPS = ("Output and logging", BY_DEFAULT)
OMITTED_DATA_ROWS = ("source", "fingerprint", "mixture")
_TUNED = {"full": "all weights", "lora": "LoRA adapters", "qlora": "LoRA adapters on 4-bit weights"}


def write_model_card(run: str | Path, repository: str | None = None) -> Path:
    """Write a finished run's card, in place of a library's; it loads the model from `repository`, or from RUN/model."""
    record = read_record(run)
    keys, model = record.keys, record.folder / "model"
    name = (repository or record.name).rsplit("/", 1)[-1]
    is_classifier = task_of(keys) == "classification"
    is_adapter = (model / "adapter_config.json").is_file()
    trained_on = _trained_on(keys)
    step, evaluation = final_evaluation(record) or (None, {})
    counts = (line["eval_documents"] for line in record.evaluations.values() if line.get("eval_documents"))
    card = ModelCard.from_template(
        _metadata(keys, name, evaluation, is_classifier, is_adapter),
        template_path=str(TEMPLATE),
        name=inline(name),
        is_classifier=is_classifier,
        is_adapter=is_adapter,
        base=inline(_public_name(keys.get("model_name_or_path", "a model"))),
        is_random=keys.get("model_init") == "random",
        tuned=inline(_TUNED.get(keys.get("tune", ""), keys.get("tune"))),
        trained_on=inline(trained_on or "its data"),
        version=inline(record.environment.get("versions", {}).get("isotune", "")),
        task="SequenceClassification" if is_classifier else "CausalLM",
        path=python_text(repository or str(model)),
        # the base model's configuration does not have the number of classes of the adapter's head
        num_labels=_head_arguments(record) if is_adapter and is_classifier else "",
        four_bit=_four_bit(record, is_classifier) if is_adapter and keys.get("tune") == "qlora" else "",
        class_names=[inline(each) for each in keys.get("label_names") or []],
        has_base_model=is_adapter and (record.folder / "base_model").is_dir(),
        results=_results(record),
        evaluated_on=inline(_evaluated_on(keys) or f"a share of {trained_on}"),
        evaluated_documents=next(counts, None),
        saved_step=step,
        data=_data(record),
        training=_training(record),
        is_script=SCRIPT in keys,
        recipe=fenced(_recipe(record), "yaml"),
    )
    replace_file(model / CARD, str(card))
    return model / CARD


def final_evaluation(record: RunRecord) -> tuple[int, dict[str, Any]] | None:
    """Step and evaluation of the saved model, the best one or that of the last step; None if it was not evaluated."""
    keys = record.keys
    if keys.get("load_best_model_at_end"):
        metric = str(keys.get("metric_for_best_model", "eval_loss"))
        sign = -1 if is_higher_better(metric, keys) else 1
        trained = {step: line for step, line in record.evaluations.items() if step}  # 0 is of eval_on_start
        values = {step: line[metric] for step, line in trained.items() if line.get(metric) is not None}
        step = min(values, key=lambda step: (sign * values[step], step), default=None)
    else:
        step = max(record.steps, default=None)
    return (step, record.evaluations[step]) if step is not None and step in record.evaluations else None


def _metadata(
    keys: dict[str, Any], name: str, evaluation: dict[str, Any], is_classifier: bool, is_adapter: bool
) -> ModelCardData:
    """The metadata; `evaluation` is the line of the saved model, empty without one."""
    base = keys.get("model_name_or_path", "")
    names = dict.fromkeys((*_data_names(keys, "dataset"), *_data_names(keys, "eval_dataset")))
    pipeline = "text-classification" if is_classifier else "text-generation"
    source = _evaluated_on(keys) or _trained_on(keys)
    results = [
        EvalResult(
            task_type=pipeline,
            dataset_type=source,
            dataset_name=source,
            # a held-out share of the training data belongs to that split
            dataset_split=keys.get("eval_dataset_split" if _evaluated_on(keys) else "dataset_split"),
            metric_type=metric,
            metric_name=_readable(key),
            metric_value=evaluation[key],
        )
        for key, metric in METRICS.items()
        if evaluation.get(key) is not None
    ]
    return ModelCardData(
        base_model=base if _on_the_hub(base) and keys.get("model_init") != "random" else None,
        base_model_relation="adapter" if is_adapter else "finetune",
        datasets=[dataset for dataset in names if dataset and _on_the_hub(dataset)] or None,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag=pipeline,
        tags=["isotune", *(["lora"] if is_adapter else [])],
        metrics=[result.metric_type for result in results] or None,
        model_name=name,
        eval_results=results or None,
    )


def _readable(key: str) -> str:
    named = {"eval_f1_macro": "macro F1", "eval_f1_micro": "micro F1", "eval_r2": "R2"}
    return named.get(key, key.removeprefix("eval_").replace("_", " "))


def _head_arguments(record: RunRecord) -> str:
    """What the configuration of an adapter's base does not say of the head; the base may have one of another size."""
    names = record.keys.get("label_names")
    classes = f", id2label={dict(enumerate(names))!r}" if names else f", num_labels={_classes(record)}"
    several = record.keys.get("task_type") == MULTI_LABEL
    problem = f", problem_type={PROBLEM_TYPES[MULTI_LABEL]!r}" if several else ""
    # a decoder's head, which reads the last token that does not pad, as its tokenizer padded in training
    padding = ", pad_token_id=tokenizer.pad_token_id" if any(".score." in name for name in _head_sizes(record)) else ""
    return f"{classes}{problem}{padding}, ignore_mismatched_sizes=True"


def _four_bit(record: RunRecord, is_classifier: bool) -> str:
    """The base in 4 bits, as the adapter was trained on it: a classifier's head was whole."""
    keys = record.keys
    compute = "bfloat16" if keys.get("bf16") else "float16" if keys.get("fp16") else "float32"
    kind, doubled = keys.get("bnb_4bit_quant_type", "nf4"), bool(keys.get("bnb_4bit_use_double_quant", True))
    whole = ""
    if is_classifier:
        run = read_run(record.folder)
        head = head_of(load_pretrained_config(str(run.base), "the base model", run.base_commit))
        whole = f", llm_int8_skip_modules={skip_patterns(head)!r}"
    return (
        f", quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type={kind!r}, "
        f'bnb_4bit_use_double_quant={doubled}, bnb_4bit_compute_dtype="{compute}"{whole})'
    )


def _classes(record: RunRecord) -> int:
    return int(record.keys.get("num_labels") or min(_head_sizes(record).values()))


def _head_sizes(record: RunRecord) -> dict[str, int]:
    """The rows of each matrix of an adapter's head, by its name."""
    from safetensors import SafetensorError, safe_open

    file = record.folder / "model" / "adapter_model.safetensors"
    try:
        with safe_open(str(file), framework="pt") as tensors:
            heads = [name for name in tensors.keys() if "lora_" not in name and name.endswith(".weight")]  # noqa: SIM118
            shapes = {name: tensors.get_slice(name).get_shape() for name in heads}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read: {first_line(error)}") from error
    sizes = {name: int(shape[0]) for name, shape in shapes.items() if shape}
    if not sizes:
        raise UserError(f"{file} has no head, whose rows are the classes")
    return sizes


def _results(record: RunRecord) -> str:
    """A row for each evaluation; empty without one."""
    names = [key for key in METRICS if any(line.get(key) is not None for line in record.evaluations.values())]
    rows = [["step", "epoch", *map(_readable, names)]]
    for step, line in record.evaluations.items():
        values = ("" if line.get(key) is None else format_number(line[key]) for key in names)
        rows.append([f"{step:,}", f"{line.get('epoch') or 0:.2f}", *values])
    return table(rows) if record.evaluations else ""


def _data(record: RunRecord) -> str:
    """The counts of data preparation, by source; local sources appear without their folders."""
    keys = record.keys
    sources = {"training": (_trained_on(keys), keys.get("dataset_split"))}
    if record.evaluations:
        held_out = f"a share of {_trained_on(keys)}"
        sources["evaluation"] = (_evaluated_on(keys) or held_out, keys.get("eval_dataset_split"))
    tables = run_tables([record])
    columns = []
    for role, (source, split) in sources.items():
        counts = tables.get(f"Data: {role}", {}).items()
        counts = {name: value for name, (value,) in counts if name not in OMITTED_DATA_ROWS}
        columns.append({"source": source + (f", {split}" if split else "")} | counts)
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [[name.replace("_", " "), *(column.get(name, "") for column in columns)] for name in names]
    return table([["", *sources], *rows])


def _training(record: RunRecord) -> str:
    environment, lines = record.environment, record.steps
    in_effect, versions = environment.get("in_effect", {}), environment.get("versions", {})
    facts: dict[str, Any] = {}
    if in_effect.get("all_parameters") and "trained_parameters" in in_effect:
        facts["trained parameters"] = f"{in_effect['trained_parameters']:,} of {in_effect['all_parameters']:,}"
    if lines:
        facts["steps"] = f"{lines.steps[-1]:,}"
        losses = lines.column("loss")
        for which, place in (("first", 0), ("last", -1)):
            loss = float(losses[place])
            facts[f"loss, {which} {steps_in_words(lines, place)}"] = (
                format_number(loss) if math.isfinite(loss) else "not finite"
            )
        sums = {key: lines.total(key) for key in ("input_tokens", "documents", "step_seconds")}
        facts["input tokens"], facts["documents"] = f"{sums['input_tokens']:,}", f"{sums['documents']:,}"
        facts["seconds in steps"] = format_number(float(sums["step_seconds"]))
        facts["peak memory, GB"] = format_number(float(np.nan_to_num(lines.column("peak_memory_bytes")).max()) / 1e9)
    facts["engine"], facts["processes"] = in_effect.get("engine"), environment.get("world_size")
    facts["device"] = environment.get("device_name") or environment.get("device")
    facts["precision"], facts["attention kernel"] = in_effect.get("precision"), in_effect.get("attention_kernel")
    if in_effect.get("exact_gradients") in (True, False):
        facts["exact gradients"] = "yes" if in_effect["exact_gradients"] else "no"
    libraries = [f"{name} {versions[name]}" for name in ("torch", "transformers", "peft") if name in versions]
    facts["versions"] = ", ".join(libraries)
    return table([["", ""], *([name, str(value)] for name, value in facts.items() if value not in (None, ""))])


def _recipe(record: RunRecord) -> str:
    groups = (group for title, group in record.recipe.items() if title not in OMITTED_GROUPS)
    values = {key: value for group in groups for key, value in group.items()}
    for key, value in values.items():
        if key in PATH_KEYS or (isinstance(value, str) and Path(value).is_absolute()):
            values[key] = _public_name(value)
    for key in MIXTURES:
        if mixture := values.get(key):
            values[key] = [{**each, "dataset_name": _public_name(each["dataset_name"])} for each in mixture]
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True).rstrip()


def _data_names(keys: dict[str, Any], role: str) -> list[str]:
    """The data sets of training (`dataset`) or evaluation (`eval_dataset`): one, or those of a mixture."""
    if keys.get(f"{role}_mixture"):
        return [entry["dataset_name"] for entry in keys[f"{role}_mixture"]]
    return [keys[f"{role}_name"]] if keys.get(f"{role}_name") else []


def _trained_on(keys: dict[str, Any]) -> str:
    return mixture_name([{"dataset_name": _public_name(name)} for name in _data_names(keys, "dataset")])


def _evaluated_on(keys: dict[str, Any]) -> str:
    """Empty where no data set is named."""
    return mixture_name([{"dataset_name": _public_name(name)} for name in _data_names(keys, "eval_dataset")])


def _on_the_hub(name: str) -> bool:
    return is_hub_id(name) and not Path(name).exists()


def _public_name(name: str) -> str:
    """A Hub id or builtin:NAME unchanged; the last part of a local path."""
    return name if _on_the_hub(name) or name.startswith("builtin:") else Path(name).name or name
