"""RUN/model/README.md: the model card, with every number read from the run's own files.

The metadata are huggingface_hub's ModelCardData, from which the Hub shows base model, data and results. The text
describes the run and how to load the model. Of local paths only the last part appears: the card may be uploaded.
"""

from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from isotune.data.sources.hub import is_hub_id
from isotune.io.files import replace_file
from isotune.report.formatting import format_number
from isotune.report.run_record import RunRecord, read_record
from isotune.report.run_tables import run_tables

CARD = "README.md"
ADAPTER = "adapter_config.json"
# the Hub's name of each metric of an evaluation line
METRICS = {"eval_accuracy": "accuracy", "eval_f1_macro": "f1", "eval_loss": "loss", "eval_perplexity": "perplexity"}
HIGHER_IS_BETTER = ("eval_accuracy", "eval_f1_macro")
PATH_KEYS = ("model_name_or_path", "tokenizer_name_or_path", "dataset_name", "eval_dataset_name")
OMITTED_GROUP = "Output and logging"
OMITTED_DATA_ROWS = ("source", "fingerprint")


def write_model_card(run: str | Path, repository: str | None = None) -> Path:
    """Write the card of a finished run; it replaces one that a library has written.

    Args:
        run: RUN, with RUN/model.
        repository: the Hub id that the card loads the model from; None is the folder.

    Raises:
        UserError: the folder is not a run, or cannot be written.
    """
    record = read_record(run)
    path = record.folder / "model" / CARD
    replace_file(path, str(model_card(record, repository)))
    return path


def model_card(record: RunRecord, repository: str | None = None) -> ModelCard:
    """The card of a run; see `write_model_card`."""
    name = (repository or record.name).rsplit("/", 1)[-1]
    data = _metadata(record, name)
    text = "\n\n".join(
        part
        for part in (
            f"# {name}",
            _introduction(record),
            "## Load it\n\n" + _loading(record, repository or str(record.folder / "model")),
            "## Results\n\n" + _results(record),
            "## Data\n\n" + _data(record),
            "## Training\n\n" + _training(record),
            "## Recipe\n\n" + _recipe(record),
        )
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n")


def final_evaluation(record: RunRecord) -> tuple[int, dict[str, Any]] | None:
    """The step and the evaluation of the saved model; None if that model was not evaluated.

    With `load_best_model_at_end` it is the best evaluation, otherwise the one after the last step.
    """
    keys = record.keys
    if keys.get("load_best_model_at_end"):
        metric = str(keys.get("metric_for_best_model", "eval_loss"))
        sign = -1 if metric in HIGHER_IS_BETTER else 1
        values = {step: line[metric] for step, line in record.evaluations.items() if line.get(metric) is not None}
        if not values:
            return None
        step = min(values, key=lambda step: (sign * values[step], step))
        return step, record.evaluations[step]
    last = max(record.steps, default=None)
    return (last, record.evaluations[last]) if last in record.evaluations else None


def _is_classifier(record: RunRecord) -> bool:
    return record.keys.get("overlong") in ("head", "tail", "head_tail")


def _is_adapter(record: RunRecord) -> bool:
    return (record.folder / "model" / ADAPTER).is_file()


def _metadata(record: RunRecord, name: str) -> ModelCardData:
    keys = record.keys
    base = keys.get("model_name_or_path", "")
    names = dict.fromkeys((keys.get("dataset_name"), keys.get("eval_dataset_name")))
    datasets = [dataset for dataset in names if dataset and _on_the_hub(dataset)]
    evaluated = final_evaluation(record)
    results = _eval_results(record, evaluated[1]) if evaluated else []
    return ModelCardData(
        base_model=base if _on_the_hub(base) and keys.get("model_init") != "random" else None,
        base_model_relation="adapter" if _is_adapter(record) else "finetune",
        datasets=datasets or None,
        library_name="peft" if _is_adapter(record) else "transformers",
        pipeline_tag="text-classification" if _is_classifier(record) else "text-generation",
        tags=["isotune", *(["lora"] if _is_adapter(record) else [])],
        metrics=[result.metric_type for result in results] or None,
        model_name=name,
        eval_results=results or None,
    )


def _eval_results(record: RunRecord, line: dict[str, Any]) -> list[EvalResult]:
    keys = record.keys
    classifier = _is_classifier(record)
    source = keys.get("eval_dataset_name") or keys.get("dataset_name", "")
    shared = {
        "task_type": "text-classification" if classifier else "text-generation",
        "dataset_type": _public_name(source),
        "dataset_name": _public_name(source),
        # a held-out share of the training data belongs to that split
        "dataset_split": keys.get("eval_dataset_split" if keys.get("eval_dataset_name") else "dataset_split"),
    }
    return [
        EvalResult(metric_type=metric, metric_name=_readable(key), metric_value=line[key], **shared)
        for key, metric in METRICS.items()
        if line.get(key) is not None
    ]


def _readable(key: str) -> str:
    return {"eval_f1_macro": "macro F1"}.get(key, key.removeprefix("eval_"))


def _introduction(record: RunRecord) -> str:
    keys = record.keys
    how = {"full": "all weights", "lora": "LoRA adapters", "qlora": "LoRA adapters on 4-bit weights"}
    base = _public_name(keys.get("model_name_or_path", "a model"))
    start = " with random weights" if keys.get("model_init") == "random" else ""
    version = record.environment.get("versions", {}).get("isotune", "")
    kind = "A classifier" if _is_classifier(record) else "A language model"
    return (
        f"{kind}: {base}{start}, fine-tuned ({how.get(keys.get('tune', ''), keys.get('tune'))}) on "
        f"{_public_name(keys.get('dataset_name', 'its data'))} by isotune {version}. The figures below are read "
        "from the files of the run."
    )


def _loading(record: RunRecord, path: str) -> str:
    what = "SequenceClassification" if _is_classifier(record) else "CausalLM"
    tokenizer = f'tokenizer = AutoTokenizer.from_pretrained("{path}")'
    if not _is_adapter(record):
        lines = [f"from transformers import AutoModelFor{what}, AutoTokenizer", tokenizer]
        lines.append(f'model = AutoModelFor{what}.from_pretrained("{path}")')
        return _code("python", "\n".join(lines))
    # the base model's configuration does not have the number of classes of the adapter's head
    classes = f", num_labels={_classes(record)}" if _is_classifier(record) else ""
    lines = ["from peft import AutoPeftModelFor" + what + "; from transformers import AutoTokenizer", tokenizer]
    lines.append(f'model = AutoPeftModelFor{what}.from_pretrained("{path}"{classes})')
    text = _code("python", "\n".join(lines))
    if (record.folder / "base_model").is_dir():
        text += "\n\nIts base model has random weights of the run and is in the run's `base_model/` only."
    return text


def _classes(record: RunRecord) -> int:
    from safetensors import safe_open

    if record.keys.get("num_labels"):
        return int(record.keys["num_labels"])
    with safe_open(str(record.folder / "model" / "adapter_model.safetensors"), framework="pt") as tensors:
        heads = [name for name in tensors.keys() if "lora_" not in name and name.endswith(".weight")]  # noqa: SIM118
        return min(tensors.get_slice(name).get_shape()[0] for name in heads)


def _results(record: RunRecord) -> str:
    if not record.evaluations:
        return "The run evaluated nothing."
    names = [key for key in METRICS if any(line.get(key) is not None for line in record.evaluations.values())]
    rows = [["step", "epoch", *map(_readable, names)]]
    for step, line in record.evaluations.items():
        values = [line.get(key) for key in names]
        rows.append(
            [f"{step:,}", f"{line.get('epoch') or 0:.2f}", *("" if v is None else format_number(v) for v in values)]
        )
    keys = record.keys
    source = _public_name(keys.get("eval_dataset_name") or f"a share of {_public_name(keys.get('dataset_name', ''))}")
    count = next((line["eval_documents"] for line in record.evaluations.values() if line.get("eval_documents")), None)
    evaluated_on = f"On {source}" + (f", {count:,} documents" if count else "") + ":"
    evaluated = final_evaluation(record)
    saved = f"The model is that of step {evaluated[0]:,}." if evaluated else "The saved model itself was not evaluated."
    return f"{evaluated_on}\n\n{_table(rows)}\n\n{saved}"


def _data(record: RunRecord) -> str:
    """The counts of data preparation, by source; local sources appear without their folders."""
    keys = record.keys
    columns = {"training": (keys.get("dataset_name"), keys.get("dataset_split"))}
    if record.evaluations:
        held_out = f"a share of {_public_name(keys.get('dataset_name', ''))}"
        columns["evaluation"] = (keys.get("eval_dataset_name") or held_out, keys.get("eval_dataset_split"))
    counts = {table.caption.removeprefix("Data: "): table for table in run_tables([record])}
    data = [
        {"source": f"{_public_name(source or '')}{f', {split}' if split else ''}"}
        | {
            row.name: row.values[0]
            for row in getattr(counts.get(role), "rows", ())
            if row.name not in OMITTED_DATA_ROWS
        }
        for role, (source, split) in columns.items()
    ]
    names = dict.fromkeys(name for column in data for name in column)
    rows = [[name.replace("_", " "), *(column.get(name, "") for column in data)] for name in names]
    return _table([["", *columns], *rows])


def _training(record: RunRecord) -> str:
    in_effect, lines = record.environment.get("in_effect", {}), list(record.steps.values())
    facts: list[tuple[str, Any]] = []
    if in_effect.get("all_parameters"):
        trained, total = in_effect["trained_parameters"], in_effect["all_parameters"]
        facts.append(("trained parameters", f"{trained:,} of {total:,}"))
    if lines:
        facts += [("steps", f"{len(lines):,}"), ("loss, first step", format_number(lines[0]["loss"]))]
        facts.append(("loss, last step", format_number(lines[-1]["loss"])))
        facts.append(("input tokens", f"{sum(line['input_tokens'] for line in lines):,}"))
        facts.append(("documents", f"{sum(line['documents'] for line in lines):,}"))
        facts.append(("seconds in steps", format_number(float(sum(line["step_seconds"] for line in lines)))))
        facts.append(("peak memory, GB", format_number(max(line["peak_memory_bytes"] for line in lines) / 1e9)))
    facts.append(("engine", in_effect.get("engine")))
    facts.append(("processes", record.environment.get("world_size")))
    facts.append(("device", record.environment.get("device_name") or record.environment.get("device")))
    facts += [(name.replace("_", " "), in_effect.get(name)) for name in ("precision", "attention_kernel")]
    facts.append(("exact gradients", {True: "yes", False: "no"}.get(in_effect.get("exact_gradients"))))  # type: ignore[arg-type]
    versions = record.environment.get("versions", {})
    libraries = [f"{name} {versions[name]}" for name in ("torch", "transformers", "peft") if name in versions]
    facts.append(("versions", ", ".join(libraries)))
    return _table([["", ""], *([name, str(value)] for name, value in facts if value not in (None, ""))])


def _recipe(record: RunRecord) -> str:
    values = {
        key: _public_name(value)
        if key in PATH_KEYS or (isinstance(value, str) and Path(value).is_absolute())
        else value
        for title, group in record.recipe.items()
        for key, value in group.items()
        if title != OMITTED_GROUP
    }
    return _code("yaml", yaml.safe_dump(values, sort_keys=False, allow_unicode=True).rstrip())


def _on_the_hub(name: str) -> bool:
    return is_hub_id(name) and not Path(name).exists()


def _public_name(name: str) -> str:
    """A Hub id or builtin:NAME unchanged; the last part of a local path."""
    return name if _on_the_hub(name) or name.startswith("builtin:") else Path(name).name or name


def _table(rows: list[list[str]]) -> str:
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def _code(language: str, text: str) -> str:
    return f"```{language}\n{text}\n```"
