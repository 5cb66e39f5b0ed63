"""RUN/report.html: one self-contained and accessible file with the settings, curves and results of a run."""

import base64
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from isotune import __version__
from isotune.config.task_types import MULTI_LABEL, SINGLE_LABEL
from isotune.evaluation.classification.examples import kept_errors, read_examples
from isotune.evaluation.comparison import compare_runs
from isotune.evaluation.results import CLASSIFICATION, GENERATION, Result
from isotune.evaluation.samples import read_samples
from isotune.evaluation.statistics.resampling import without_class
from isotune.io.errors import UserError
from isotune.io.files import replace_file
from isotune.io.reading import Unreadable, read_bytes
from isotune.report import charts, formatting
from isotune.report.run_record import RunRecord, changed_tables, differ, read_record, run_summary, run_tables

REPORT = "report.html"
MARK, HEAD_BYTES = b": isotune report</title>", 16_384  # by which a report is known, near its beginning
LONGEST_NAME = 100  # characters of the names of other runs in a file's name
HERE = Path(__file__).parent
MAX_EXAMPLES = 10
MAX_TEXT_CHARACTERS = 2_000
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# characters that HTML does not allow, and lone surrogates, which UTF-8 cannot encode
_FORBIDDEN = dict.fromkeys(
    [*range(9), 11, 12, *range(14, 32), *range(127, 160), *range(0xD800, 0xE000)], "\N{REPLACEMENT CHARACTER}"
)


def write_report(runs: Sequence[str | Path], output: str | Path | None = None) -> Path:
    """Write the report of one run, or of several side by side, atomically: by default report.html of the run.

    Beside other runs it is report-with-OTHERS.html of the first, whose own report stays. The file loads nothing, by its
    security policy. UserError if a folder is no run, or the file cannot be written or is there and no report.
    """
    html = render_report(runs)
    others = [Path(run).expanduser().resolve() for run in runs[1:]]
    own = f"report-with-{'-'.join(other.name for other in others)[:LONGEST_NAME]}.html" if others else REPORT
    file = Path(output) if output is not None else Path(runs[0]) / own
    if file.is_file() and MARK not in file.read_bytes()[:HEAD_BYTES]:
        raise UserError(f"--output {file} is there and is no report: choose another file")
    try:
        replace_file(file, html)
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror}") from error
    return file


def render_report(runs: Sequence[str | Path]) -> str:
    """The report as HTML."""
    records = [read_record(run) for run in runs]
    notes = [note for record in records for note in record.notes]
    tables = run_tables(records)
    several = len(records) > 1
    letters = [f"{formatting.run_letter(index)}: " if several else "" for index in range(len(records))]
    names = [letter + record.name for letter, record in zip(letters, records, strict=True)]
    evaluated = dict.fromkeys(result.folder.name for record in records for result in record.results)
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,  # every value comes from a run's files, and none is markup
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": formatting.format_number,
        "signed": formatting.format_signed,
        "p": formatting.format_p,
        "truncated": _truncate,
        "differ": differ,
    }
    html = environment.get_template("report.html.jinja").render(
        title=" and ".join(record.name for record in records),
        version=__version__,
        style=Markup((HERE / "report.css").read_text(encoding="utf-8")),
        runs=[(name, record, run_summary(record)) for name, record in zip(names, records, strict=True)],
        samples=[
            (name, own) for name, record in zip(names, records, strict=True) if (own := read_samples(record.folder))
        ],
        names=names,
        several=several,
        charts=charts.draw_charts(records),
        layout=charts,
        tables=tables,
        differences=changed_tables(tables) if several else {},
        evaluations=[_evaluation(name, records, names, notes) for name in evaluated],
        notes=notes,
        formatting=formatting,
    )
    return html.lstrip().translate(_FORBIDDEN)


def _evaluation(name: str, records: Sequence[RunRecord], runs: Sequence[str], notes: list[str]) -> dict[str, Any]:
    """All results under one name as the template reads them, a column for each run that has it; adds to `notes`."""
    found = [(i, result) for i, record in enumerate(records) for result in record.results if result.folder.name == name]
    results = {runs[index]: result for index, result in found}
    first = next(iter(results.values()))
    facts = first.facts
    named = (metric for result in results.values() for metric in (*result.metrics, *result.undefined))
    metrics = dict.fromkeys(named)
    title, examples = _examples(results, notes)
    comparison, not_compared = None, ""
    try:
        if len(results) > 1:
            comparison = compare_runs([result.folder for result in results.values()])
    except UserError as mistake:
        not_compared = str(mistake)
    return {
        "name": name,
        "facts": f"{facts['kind']}, {len(first.predictions):,} rows of {facts['dataset_name']} "
        f"({facts['dataset_split']})"
        + "".join(_chance_test(run if len(runs) > 1 else "", result) for run, result in results.items()),
        "runs": list(results),
        "letters": [formatting.run_letter(index) for index, _ in found],
        "results": list(results.values()),
        "metrics": [metric for metric in metrics if without_class(metric) == metric],
        "per_class": [metric for metric in metrics if without_class(metric) != metric],
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


def _plots(run: str, result: Result, notes: list[str]) -> list[dict[str, Any]]:
    """Each PNG as a data URI, with the lines of the text file beside it: a sentence first, which its name may give."""
    plots = []
    for file in sorted(result.folder.glob("*.png")):
        content = _content(file, notes)
        if content is None:
            continue
        if content.startswith(_PNG_SIGNATURE):
            uri = "data:image/png;base64," + base64.b64encode(content).decode()
            text = (_content(file.with_suffix(".txt"), notes) or b"").decode("utf-8", errors="replace")
            name = file.stem.replace("_", " ").replace("-", " ")
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            description, *details = lines or [f"{name}, of the evaluation {result.folder.name}"]
            plots.append({"uri": uri, "description": description, "details": details, "run": run})
        else:
            notes.append(f"{file} is left out: it is not a PNG file.")
    return plots


def _content(file: Path, notes: list[str]) -> bytes | None:
    """The content of a picture, or of the text beside it; None where there is none, or `notes` say why not."""
    try:
        return read_bytes(file, root=file.parent)
    except FileNotFoundError:
        return None
    except Unreadable as reason:
        notes.append(f"{file} is left out: {reason}.")
        return None


def _examples(results: dict[str, Result], notes: list[str]) -> tuple[str, list[dict[str, Any]]]:
    """A title, and rows with their predictions; `is_right` is None where the evaluation does not say."""
    first = next(iter(results.values()))
    task_type = first.facts.get("task_type", SINGLE_LABEL)
    if first.facts["kind"] == CLASSIFICATION and task_type != SINGLE_LABEL:
        written = [example for run, result in results.items() for example in _written_examples(run, result, notes)]
        return "Most wrong labels" if task_type == MULTI_LABEL else "Largest errors", written
    if first.facts["kind"] == CLASSIFICATION:
        errors = [example for run, result in results.items() for example in _confident_errors(run, result, notes)]
        return "Most confident errors", errors
    return "Answers beside their references", _answers(results) if first.facts["kind"] == GENERATION else []


def _written_examples(run: str, result: Result, notes: list[str]) -> list[dict[str, Any]]:
    """The first errors that the evaluation wrote down in words."""
    return [
        {"id": row["id"], "input": row["text"], "reference": row["actual"],
         "answers": [{"run": run, "text": row["predicted"], "is_right": False}]}
        for row in kept_errors(result.folder, notes)[:MAX_EXAMPLES]
    ]  # fmt: skip


def _confident_errors(run: str, result: Result, notes: list[str]) -> list[dict[str, Any]]:
    """The misclassified rows with the highest probability of the predicted class, the highest first."""
    # predictions.jsonl has none
    texts = {row["id"]: row["text"] for row in read_examples(result.folder, notes)}
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
        examples.append({"id": row["id"], "input": texts.get(row["id"]), "reference": reference, "answers": [answer]})
    return examples


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
        row, own = first[row_id], {run: rows[row_id] for run, rows in by_id.items() if row_id in rows}
        answers = [{"run": run, "text": each.get("text"), "is_right": _is_right(each)} for run, each in own.items()]
        reference = row.get("reference")
        examples.append({"id": row_id, "input": row.get("prompt"), "reference": reference, "answers": answers})
    return examples


def _is_right(row: dict[str, Any]) -> bool | None:
    match = row.get("exact_match", row.get("match"))
    return None if match is None or not math.isfinite(match) else bool(match)


def _truncate(text: Any) -> str:
    full = "" if text is None else str(text)
    if len(full) <= MAX_TEXT_CHARACTERS:
        return full
    return f"{full[:MAX_TEXT_CHARACTERS]} … ({len(full):,} characters)"
