"""The evaluations of one or several runs, by name: metrics, plots, examples, and the comparison of the runs.

They are dictionaries, as the report's template reads them.
"""

import base64
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from isotune.evaluation.comparison import Comparison, compare_runs
from isotune.evaluation.results import CLASSIFICATION, GENERATION, Result
from isotune.io.errors import UserError
from isotune.report.formatting import format_number, run_letter
from isotune.report.run_record import Row, RunRecord

EXAMPLES_FILE = "examples.jsonl"
MAX_EXAMPLES = 10
MAX_TEXT_CHARACTERS = 2_000
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def gather_evaluations(records: Sequence[RunRecord], notes: list[str]) -> list[dict[str, Any]]:
    """Every evaluation that any of the runs has; `notes` collects what is broken."""
    names = dict.fromkeys(result.folder.name for record in records for result in record.results)
    return [_evaluation(name, records, notes) for name in names]


def _evaluation(name: str, records: Sequence[RunRecord], notes: list[str]) -> dict[str, Any]:
    """All results under one name; the columns are those of the runs that have it."""
    several = len(records) > 1
    results: dict[str, Result] = {}
    letters = []
    for index, record in enumerate(records):
        result = next((result for result in record.results if result.folder.name == name), None)
        if result is not None:
            results[f"{run_letter(index)}: {record.name}" if several else record.name] = result
            letters.append(run_letter(index))
    first = next(iter(results.values()))
    facts = first.facts
    metrics = dict.fromkeys(metric for result in results.values() for metric in result.metrics)
    # a value and an interval of each run in turn
    rows = [Row(metric, [cell for result in results.values() for cell in _cells(result, metric)]) for metric in metrics]
    title, examples = _examples(results)
    comparison, not_compared = _compare(list(results.values()))
    return {
        "name": name,
        "facts": f"{facts['kind']}, {len(first.predictions):,} rows of {facts['dataset_name']} "
        f"({facts['dataset_split']})"
        + "".join(_chance_test(run if several else "", result) for run, result in results.items()),
        "runs": list(results),
        "letters": letters,
        "metrics": [row for row in rows if "_class_" not in row.name],
        "per_class": [row for row in rows if "_class_" in row.name],
        "plots": [plot for run, result in results.items() for plot in _plots(run, result, notes)],
        "examples_title": title,
        "reference_name": "Actual" if facts["kind"] == CLASSIFICATION else "Reference",
        "examples": examples,
        "comparison": comparison,
        "not_compared": not_compared,
    }


def _chance_test(run: str, result: Result) -> str:
    """The result of an evaluation's test against chance, where it has one; an alarm comes first."""
    if "verdict" not in result.facts:
        return ""
    alarm = f"ALARM, {result.facts['alarm']}: " if result.facts.get("alarm") else ""
    return f". {run and run + ': '}{alarm}{result.facts['verdict']}"


def _compare(results: list[Result]) -> tuple[Comparison | None, str]:
    if len(results) < 2:
        return None, ""
    try:
        return compare_runs([result.folder for result in results]), ""
    except UserError as mistake:
        return None, str(mistake)


def _cells(result: Result, metric: str) -> tuple[str, str]:
    """A metric's value and interval as text; both empty where the result lacks it."""
    if metric not in result.metrics:
        return "", ""
    low, high = map(format_number, result.intervals.get(metric, ("", "")))
    return format_number(result.metrics[metric]), f"{low} to {high}" if low else ""


def _plots(run: str, result: Result, notes: list[str]) -> list[dict[str, Any]]:
    """Each PNG as a data URI, with a sentence that describes it and further lines of description."""
    plots = []
    for file in sorted(result.folder.glob("*.png")):
        content = file.read_bytes()
        if content.startswith(_PNG_SIGNATURE):
            uri = "data:image/png;base64," + base64.b64encode(content).decode()
            description, *details = _description(file, result)
            plots.append({"uri": uri, "description": description, "details": details, "run": run})
        else:
            notes.append(f"{file} is left out: it is not a PNG file.")
    return plots


def _description(file: Path, result: Result) -> list[str]:
    """The lines of the text file beside a plot, a sentence first; without one, the words of the plot's name."""
    text_file = file.with_suffix(".txt")
    text = text_file.read_text(encoding="utf-8", errors="replace") if text_file.is_file() else ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines or [f"{file.stem.replace('_', ' ').replace('-', ' ')}, of the evaluation {result.folder.name}"]


def _examples(results: dict[str, Result]) -> tuple[str, list[dict[str, Any]]]:
    """A title, and rows with their predictions; `is_right` is None where the evaluation does not say."""
    first = next(iter(results.values()))
    if first.facts["kind"] == CLASSIFICATION:
        errors = [example for run, result in results.items() for example in _confident_errors(run, result)]
        return "Most confident errors", errors
    return "Answers beside their references", _answers(results) if first.facts["kind"] == GENERATION else []


def _confident_errors(run: str, result: Result) -> list[dict[str, Any]]:
    """The misclassified rows with the highest probability of the predicted class, the highest first."""
    texts = _example_texts(result.folder / EXAMPLES_FILE)
    errors = []
    for row in result.predictions:
        probabilities = row.get("probabilities") or []
        predicted = max(range(len(probabilities)), key=probabilities.__getitem__, default=None)
        if predicted is not None and predicted != row.get("label"):
            errors.append((probabilities[predicted], predicted, row))
    errors.sort(key=lambda error: -error[0])
    examples = []
    for probability, predicted, row in errors[:MAX_EXAMPLES]:
        text = f"{_class_name(predicted, result)}, probability {probability:.3f}"
        answer = {"run": run, "text": text, "is_right": False}
        reference = _class_name(row.get("label"), result)
        examples.append(_example(row["id"], texts.get(row["id"]), reference, [answer]))
    return examples


def _example_texts(file: Path) -> dict[Any, str]:
    """The texts of the rows that the evaluation kept as examples, by id; predictions.jsonl has no texts."""
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        return {row["id"]: row["text"] for row in rows}
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def _class_name(label: Any, result: Result) -> str:
    names = result.facts.get("label_names")
    if isinstance(names, list) and isinstance(label, int) and 0 <= label < len(names):
        return str(names[label])
    return f"class {label}"


def _answers(results: dict[str, Result]) -> list[dict[str, Any]]:
    """Rows with the answer of every run: first those on which the runs disagree, then those that are wrong."""
    by_id = {run: {row["id"]: row for row in result.predictions} for run, result in results.items()}
    first = next(iter(by_id.values()))

    def order(row_id: Any) -> tuple[bool, bool]:
        texts = {rows[row_id].get("text") for rows in by_id.values() if row_id in rows}
        return len(texts) == 1, all(_is_right(rows[row_id]) is True for rows in by_id.values() if row_id in rows)

    examples = []
    for row_id in sorted(first, key=order)[:MAX_EXAMPLES]:
        answers = [
            {"run": run, "text": _truncate(rows[row_id].get("text")), "is_right": _is_right(rows[row_id])}
            for run, rows in by_id.items()
            if row_id in rows
        ]
        row = first[row_id]
        examples.append(_example(row_id, row.get("prompt"), _truncate(row.get("reference")), answers))
    return examples


def _example(row_id: Any, text: Any, reference: str, answers: list[dict[str, Any]]) -> dict[str, Any]:
    return {"id": str(row_id), "input": _truncate(text), "reference": reference, "answers": answers}


def _is_right(row: dict[str, Any]) -> bool | None:
    match = row.get("exact_match", row.get("match"))
    return None if match is None or not math.isfinite(match) else bool(match)


def _truncate(text: Any) -> str:
    full = "" if text is None else str(text)
    if len(full) <= MAX_TEXT_CHARACTERS:
        return full
    return f"{full[:MAX_TEXT_CHARACTERS]} … ({len(full):,} characters)"
