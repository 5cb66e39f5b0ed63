"""RUN/model/README.md: the card with which a model travels, every figure of it read from the run's own files.

The metadata on top are huggingface_hub's ModelCardData, so the Hub shows base model, data and results; the text says
what ran and how to load it. Local folders appear by their own names only: a card may be uploaded.
"""

from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from isotune.data.sources.hub import is_hub_id
from isotune.io.files import replace_file
from isotune.report.run_record import RunRecord, read_record
from isotune.report.what_ran import tables
from isotune.report.wording import number

CARD = "README.md"
ADAPTER = "adapter_config.json"
# What an evaluation line holds, by the Hub's name of the metric.
METRICS = {"eval_accuracy": "accuracy", "eval_f1_macro": "f1", "eval_loss": "loss", "eval_perplexity": "perplexity"}
HIGHER_IS_BETTER = ("eval_accuracy", "eval_f1_macro")
PATHS = ("model_name_or_path", "tokenizer_name_or_path", "dataset_name", "eval_dataset_name")
NOT_OF_INTEREST = "Output and logging"
NOT_OF_DATA = ("source", "fingerprint")


def write_model_card(run: str | Path, repository: str | None = None) -> Path:
    """Write the card of a finished run, in place of any that a library has left there.

    Args:
        run: RUN, with RUN/model.
        repository: the Hub id under which the model will be loaded; None is its folder.

    Raises:
        UserError: the folder is no run, or cannot be written.
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
    """The evaluation of the model that was saved, and its step; None where that one was not evaluated.

    It is the best where `load_best_model_at_end` put it back, else the one after the last step.
    """
    keys = record.keys
    if keys.get("load_best_model_at_end"):
        metric = str(keys.get("metric_for_best_model", "eval_loss"))
        sign = -1 if metric in HIGHER_IS_BETTER else 1
        judged = {step: line for step, line in record.evaluations.items() if line.get(metric) is not None}
        if not judged:
            return None
        step = min(judged, key=lambda step: (sign * judged[step][metric], step))
        return step, judged[step]
    last = max(record.steps, default=None)
    return (last, record.evaluations[last]) if last in record.evaluations else None


def _is_classifier(record: RunRecord) -> bool:
    return record.keys.get("overlong") in ("head", "tail", "head_tail")


def _is_adapter(record: RunRecord) -> bool:
    return (record.folder / "model" / ADAPTER).is_file()


def _metadata(record: RunRecord, name: str) -> ModelCardData:
    keys = record.keys
    base = keys.get("model_name_or_path", "")
    named = (keys.get("dataset_name"), keys.get("eval_dataset_name"))
    sets = list(dict.fromkeys(one for one in named if one and _on_the_hub(one)))
    evaluated = final_evaluation(record)
    results = _eval_results(record, evaluated[1]) if evaluated else []
    return ModelCardData(
        base_model=base if _on_the_hub(base) and keys.get("model_init") != "random" else None,
        base_model_relation="adapter" if _is_adapter(record) else "finetune",
        datasets=sets or None,
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
        "dataset_type": _shown(source),
        "dataset_name": _shown(source),
        # a share of the training data that was kept aside belongs to that split
        "dataset_split": keys.get("eval_dataset_split" if keys.get("eval_dataset_name") else "dataset_split"),
    }
    return [
        EvalResult(metric_type=metric, metric_name=_in_words(key), metric_value=line[key], **shared)
        for key, metric in METRICS.items()
        if line.get(key) is not None
    ]


def _in_words(key: str) -> str:
    return {"eval_f1_macro": "macro F1"}.get(key, key.removeprefix("eval_"))


def _introduction(record: RunRecord) -> str:
    keys = record.keys
    how = {"full": "all weights", "lora": "LoRA adapters", "qlora": "LoRA adapters on 4-bit weights"}
    base = _shown(keys.get("model_name_or_path", "a model"))
    start = " with random weights" if keys.get("model_init") == "random" else ""
    kind = "A classifier" if _is_classifier(record) else "A language model"
    return (
        f"{kind}: {base}{start}, fine-tuned ({how.get(keys.get('tune', ''), keys.get('tune'))}) on "
        f"{_shown(keys.get('dataset_name', 'its data'))} by isotune {_version(record)}. The figures below are read "
        "from the files of the run."
    )


def _loading(record: RunRecord, place: str) -> str:
    what = "SequenceClassification" if _is_classifier(record) else "CausalLM"
    tokenizer = f'tokenizer = AutoTokenizer.from_pretrained("{place}")'
    if not _is_adapter(record):
        lines = [f"from transformers import AutoModelFor{what}, AutoTokenizer", tokenizer]
        lines.append(f'model = AutoModelFor{what}.from_pretrained("{place}")')
        return _code("python", "\n".join(lines))
    # the head's size is that of the adapter, which the base's own configuration does not know
    classes = f", num_labels={_classes(record)}" if _is_classifier(record) else ""
    lines = ["from peft import AutoPeftModelFor" + what + "; from transformers import AutoTokenizer", tokenizer]
    lines.append(f'model = AutoPeftModelFor{what}.from_pretrained("{place}"{classes})')
    text = _code("python", "\n".join(lines))
    if (record.folder / "base_model").is_dir():
        text += "\n\nIts base model was made at random by the run and lies in the run's `base_model/` only."
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
    rows = [["step", "epoch", *map(_in_words, names)]]
    for step, line in record.evaluations.items():
        values = [line.get(key) for key in names]
        rows.append([f"{step:,}", f"{line.get('epoch') or 0:.2f}", *("" if v is None else number(v) for v in values)])
    keys = record.keys
    source = _shown(keys.get("eval_dataset_name") or f"a share of {_shown(keys.get('dataset_name', ''))}")
    count = next((line["eval_documents"] for line in record.evaluations.values() if line.get("eval_documents")), None)
    on = f"On {source}" + (f", {count:,} documents" if count else "") + ":"
    evaluated = final_evaluation(record)
    saved = f"The model is that of step {evaluated[0]:,}." if evaluated else "The saved model itself was not evaluated."
    return f"{on}\n\n{_table(rows)}\n\n{saved}"


def _data(record: RunRecord) -> str:
    """What preparation counted; the sources are named as the recipe names them, without their folders."""
    keys = record.keys
    columns = {"training": (keys.get("dataset_name"), keys.get("dataset_split"))}
    if record.evaluations:
        held_out = f"a share of {_shown(keys.get('dataset_name', ''))}"
        columns["evaluation"] = (keys.get("eval_dataset_name") or held_out, keys.get("eval_dataset_split"))
    counted = {table.caption.removeprefix("Data: "): table for table in tables([record])}
    found = [
        {"source": f"{_shown(source or '')}{f', {split}' if split else ''}"}
        | {row.name: row.values[0] for row in getattr(counted.get(role), "rows", ()) if row.name not in NOT_OF_DATA}
        for role, (source, split) in columns.items()
    ]
    names = dict.fromkeys(name for column in found for name in column)
    rows = [[name.replace("_", " "), *(column.get(name, "") for column in found)] for name in names]
    return _table([["", *columns], *rows])


def _training(record: RunRecord) -> str:
    found, lines = record.environment.get("in_effect", {}), list(record.steps.values())
    facts: list[tuple[str, Any]] = []
    if found.get("all_parameters"):
        trained, whole = found["trained_parameters"], found["all_parameters"]
        facts.append(("trained parameters", f"{trained:,} of {whole:,}"))
    if lines:
        facts += [("steps", f"{len(lines):,}"), ("loss, first step", number(lines[0]["loss"]))]
        facts.append(("loss, last step", number(lines[-1]["loss"])))
        facts.append(("input tokens", f"{sum(line['input_tokens'] for line in lines):,}"))
        facts.append(("documents", f"{sum(line['documents'] for line in lines):,}"))
        facts.append(("seconds in steps", number(float(sum(line["step_seconds"] for line in lines)))))
        facts.append(("peak memory, GB", number(max(line["peak_memory_bytes"] for line in lines) / 1e9)))
    facts.append(("engine", found.get("engine")))
    facts.append(("processes", record.environment.get("world_size")))
    facts.append(("device", record.environment.get("device_name") or record.environment.get("device")))
    facts += [(name.replace("_", " "), found.get(name)) for name in ("precision", "attention_kernel")]
    facts.append(("exact gradients", {True: "yes", False: "no"}.get(found.get("exact_gradients"))))  # type: ignore[arg-type]
    versions = record.environment.get("versions", {})
    libraries = [f"{name} {versions[name]}" for name in ("torch", "transformers", "peft") if name in versions]
    facts.append(("versions", ", ".join(libraries)))
    return _table([["", ""], *([name, str(value)] for name, value in facts if value not in (None, ""))])


def _recipe(record: RunRecord) -> str:
    values = {
        key: _shown(value) if key in PATHS or (isinstance(value, str) and Path(value).is_absolute()) else value
        for title, group in record.recipe.items()
        for key, value in group.items()
        if title != NOT_OF_INTEREST
    }
    return _code("yaml", yaml.safe_dump(values, sort_keys=False, allow_unicode=True).rstrip())


def _on_the_hub(name: str) -> bool:
    return is_hub_id(name) and not Path(name).exists()


def _shown(name: str) -> str:
    """A Hub id or builtin:NAME as it is; of a local path its last part."""
    return name if _on_the_hub(name) or name.startswith("builtin:") else Path(name).name or name


def _version(record: RunRecord) -> str:
    return record.environment.get("versions", {}).get("isotune", "")


def _table(rows: list[list[str]]) -> str:
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def _code(language: str, text: str) -> str:
    return f"```{language}\n{text}\n```"
