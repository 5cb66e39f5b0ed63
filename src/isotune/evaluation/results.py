"""The files of an evaluation's result: one format for plots, comparisons and reports.

A result is a folder with two files:

    metrics.json        flat: the facts (kind, model, dataset_name, dataset_split, rows, rows_sha256), every metric by
                        its name as a number, or null where these rows do not define it, and `intervals`: its 95%
                        interval [low, high] by the same name
    predictions.jsonl   one line for each row, in the order of the data set: id, then the keys of this kind of
                        evaluation; rows of one `group` (such as the answers to one prompt) are not independent
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NotRequired

from pydantic import ConfigDict, TypeAdapter, with_config
from typing_extensions import TypedDict

from isotune.data.documents import digest
from isotune.evaluation.statistics.resampling import Scores
from isotune.io.errors import UserError
from isotune.io.files import replace_file
from isotune.io.reading import Unreadable, checked, leads_out, parse_json, read_json_object, read_text
from isotune.io.run_files import MAX_LINES_BYTES, PREDICTION_SCHEMA, Whole, is_finite_number, or_empty, or_refuse

METRICS = "metrics.json"
PREDICTIONS = "predictions.jsonl"
CLAIM = ".evaluation.json"  # what decides the result in a folder, written before the result
FACTS = ("kind", "model", "dataset_name", "dataset_split", "rows", "rows_sha256")
CLASSIFICATION, GENERATION = "classification", "generation"


@with_config(ConfigDict(extra="allow"))
class _Facts(TypedDict):
    """The facts of metrics.json that its readers rely on."""

    kind: str
    model: str
    dataset_name: str
    dataset_split: str | None
    rows: Whole
    rows_sha256: str
    task_type: NotRequired[Literal["single_label", "multi_label", "regression"]]
    label_names: NotRequired[list[Any] | None]
    verdict: NotRequired[str]
    alarm: NotRequired[str | None]
    undefined: NotRequired[list[str]]


_FACTS_SCHEMA = TypeAdapter(_Facts)


@dataclass(frozen=True)
class Result:
    """An evaluation that was read back: `predictions` has one entry for each row, with a unique `id`."""

    folder: Path
    facts: dict[str, Any]
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    predictions: list[dict[str, Any]]

    @property
    def undefined(self) -> list[str]:
        """The names of the metrics that these rows do not define."""
        return self.facts.get("undefined", [])


def claim_folder(folder: Path, evaluation: dict[str, Any], *, is_named: bool, write: bool = True) -> Path:
    """The folder for an evaluation's result: `folder`, or beside it one with a digest in its name.

    `evaluation` is what decides the result, as JSON can hold it, with the keys `dataset_name`, which does not count,
    and `data`, a digest of the content. Another evaluation's folder is never taken: if `folder` was named by the user
    (`is_named`), that is a UserError. The same evaluation again takes its own. `write` false only looks.
    """
    evaluation = json.loads(json.dumps(evaluation))
    own = digest({key: value for key, value in evaluation.items() if key != "dataset_name"})
    there = _claimed(folder, {"digest": own, **evaluation}, write)
    if there.get("digest") == own:
        return folder
    if is_named:
        raise UserError(
            f"{folder} holds another evaluation{_difference(there, evaluation)}: choose another --output_dir"
        )
    beside = folder.with_name(f"{folder.name}-{own[:8]}")
    _claimed(beside, {"digest": own, **evaluation}, write)
    return beside


def named_identity(run_dir: str | None, model: str | None, output_dir: str | None) -> dict[str, Any]:
    """What tells the model of a result from others, where the result's folder is not the run's own: paths and weights.

    The weights of a folder are told by their sizes and by blocks of their content, evenly spaced: to read those of a
    large model whole takes longer than a short evaluation.
    """
    folder = Path(model or run_dir or "")
    found: dict[str, Any] = {"model": str(folder.resolve()) if model and folder.is_dir() else model}
    if output_dir and run_dir:  # a folder of the user's may be asked to take the results of two runs
        found["run_dir"] = str(folder.resolve())
    if not model and (folder / "model").is_dir():
        folder = folder / "model"
    if (model or output_dir) and folder.is_dir():
        files = sorted(file for file in folder.iterdir() if file.suffix in (".safetensors", ".bin"))
        found["weights"] = digest(*([file.name, *_blocks(file)] for file in files))
    return found


def _blocks(file: Path, count: int = 16, size: int = 65_536) -> Iterator[Any]:
    """The size of a file in bytes, and the digest of so many blocks of it."""
    whole = file.stat().st_size
    yield whole
    with file.open("rb") as content:
        for number in range(count):
            content.seek(max(0, whole - size) * number // (count - 1))
            yield hashlib.sha256(content.read(size)).hexdigest()


def _claimed(folder: Path, claim: dict[str, Any], write: bool) -> dict[str, Any]:
    """Whose folder it is: `claim` is written where it is nobody's, by one of two that come at once."""
    if not any((folder / name).exists() for name in (METRICS, CLAIM, PREDICTIONS)):
        if not write:
            return claim
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError), (folder / CLAIM).open("x", encoding="utf-8") as file:
            json.dump(claim, file, indent=2)
            return claim
    return or_empty(read_json_object, folder / CLAIM)  # empty of an earlier version, or while it is being written


def _difference(there: dict[str, Any], here: dict[str, Any]) -> str:
    """What tells two evaluations apart, in brackets: data by their names, and the first other key."""
    different = [key for key in here if key not in ("data", "dataset_name") and there.get(key) != here[key]]
    if there.get("data") != here["data"] and "dataset_name" in there:
        if there["dataset_name"] == here["dataset_name"]:
            return f" (the contents of {here['dataset_name']} have changed since)"
        return f" (of {there['dataset_name']}, and this one is of {here['dataset_name']})"
    if not there or not different:
        return ""
    key = different[0]
    if key == "weights":
        return " (of a model with other weights)" if key in there else " (by an earlier version)"
    return f" ({key}: {json.dumps(there.get(key))[:80]} there, {json.dumps(here[key])[:80]} here)"


def rows_digest(rows: Iterable[tuple[Any, str]]) -> str:
    """SHA-256 over (id, input text) of every row in order: two results with the same one can be paired."""
    content = hashlib.sha256()
    for row_id, text in rows:
        content.update(json.dumps([row_id, text]).encode())
    return content.hexdigest()


def write_result(
    folder: Path, facts: dict[str, Any], scores: Scores, predictions: Sequence[dict[str, Any]], texts: Iterable[str]
) -> None:
    """Write both files atomically; metrics.json is last, so a folder with it holds a whole result.

    The number of `predictions` and the digest of their input `texts` are added to the facts.
    """
    ids = (row["id"] for row in predictions)
    write_aligned_result(folder, facts, scores, predictions, rows_digest(zip(ids, texts, strict=True)))


def write_aligned_result(
    folder: Path, facts: dict[str, Any], scores: Scores, predictions: Sequence[dict[str, Any]], rows_sha256: str
) -> None:
    """As `write_result`, of rows whose digest is known: they are those of another result, in its order."""
    known = {"rows": len(predictions), "rows_sha256": rows_sha256}
    content = {**{name: facts[name] for name in FACTS[:4]}, **known, **facts}
    content |= {"metric_modules": scores.modules} if scores.modules else {}
    undefined = dict.fromkeys(scores.undefined)
    content |= {"undefined": scores.undefined} if scores.undefined else {}
    if duplicates := sorted(content.keys() & {**scores.metrics, **undefined}):
        raise ValueError(f"names of both a fact and a metric: {duplicates}")
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / PREDICTIONS, "".join(json.dumps(row) + "\n" for row in predictions))
    content |= {**scores.metrics, **undefined, "intervals": scores.intervals}
    replace_file(folder / METRICS, json.dumps(content, indent=2) + "\n")


def score_lines(scores: Scores) -> list[str]:
    """A table of every metric with its interval, for the terminal."""
    width = max(map(len, [*scores.metrics, *scores.undefined, "metric"]))
    lines = [f"  {'metric':<{width}} {'value':>10}   95% interval"]
    for name, value in scores.metrics.items():
        interval = "{:.4f} to {:.4f}".format(*scores.intervals[name]) if name in scores.intervals else "none"
        lines.append(f"  {name:<{width}} {value:>10.4f}   {interval}")
    lines += [f"  {name:<{width}}   undefined on these rows" for name in scores.undefined]
    return lines + [f"  {', '.join(m['metrics'])}: interval of {m['resamples']} resamples" for m in scores.modules]


def read_result(folder: Path) -> Result:
    """The result in `folder`; UserError where a file is missing or broken, an id not unique, or a number NaN or Inf."""
    if not (folder / METRICS).is_file():
        raise UserError(f"{folder}: no {METRICS}: this folder holds no finished evaluation")
    content = or_refuse(
        lambda file: read_json_object(file, folder), folder / METRICS, f"{folder / METRICS}: cannot be read"
    )
    missing = [name for name in FACTS if name not in content]
    if missing:
        raise UserError(f"{folder / METRICS}: it does not say {', '.join(missing)}: evaluate again with this version")
    try:
        checked(content, _FACTS_SCHEMA)
    except Unreadable as reason:
        raise UserError(f"{folder / METRICS}: {reason}") from None
    predictions = read_predictions(folder / PREDICTIONS)
    if content.get("rows") != len(predictions):
        raise UserError(f"{folder / PREDICTIONS}: {len(predictions)} rows, {METRICS} says {content.get('rows')}")
    intervals = content.pop("intervals", {})
    if not isinstance(intervals, dict) or not all(
        isinstance(pair, list) and len(pair) == 2 and _are_numbers(pair) for pair in intervals.values()
    ):
        raise UserError(f"{folder / METRICS}: intervals: not each of them is a pair of numbers")
    numbers = {n: v for n, v in content.items() if n not in FACTS and type(v) in (int, float)}
    if not _are_numbers(numbers.values()):
        name = next(name for name, value in numbers.items() if not _are_numbers([value]))
        raise UserError(f"{folder / METRICS}: {name} is not a finite number")
    metrics = {name: float(value) for name, value in numbers.items()}
    scored = {*metrics, *content.get("undefined", ())}
    return Result(
        folder=folder,
        facts={name: content[name] for name in content if name not in scored},
        metrics=metrics,
        intervals={name: (pair[0], pair[1]) for name, pair in intervals.items()},
        predictions=predictions,
    )


def find_results(run: Path) -> list[Path]:
    """The folders RUN/eval/NAME that hold a result, by name, without those that a link leads out of the run."""
    return [folder for folder in _result_folders(run) if not leads_out(folder, run)]


def stray_results(run: Path) -> list[str]:
    """A sentence, without its period, for each folder RUN/eval/NAME that is left out because of a link."""
    strays = (folder for folder in _result_folders(run) if leads_out(folder, run))
    return [f"{folder}: it is a link that leads out of the run, and such are not read" for folder in strays]


def _result_folders(run: Path) -> list[Path]:
    return sorted(file.parent for file in run.glob(f"eval/*/{METRICS}"))


def read_predictions(file: Path) -> list[dict[str, Any]]:
    """The rows of predictions.jsonl; UserError names the line that is wrong."""
    rows: list[dict[str, Any]] = []
    seen: set[Any] = set()
    text = or_refuse(lambda each: read_text(each, MAX_LINES_BYTES, each.parent), file, f"{file}: cannot be read")
    for number, line in enumerate(text.removesuffix("\n").split("\n") if text else (), start=1):
        try:
            row = parse_json(line)
        except Unreadable:
            raise UserError(f"{file}: line {number} is not JSON: the file is truncated or broken") from None
        if not isinstance(row, dict) or "id" not in row:
            raise UserError(f"{file}: line {number} has no id")
        try:
            checked(row, PREDICTION_SCHEMA)
        except Unreadable as reason:
            raise UserError(f"{file}: line {number}: {reason}") from None
        if row["id"] in seen:
            raise UserError(f"{file}: line {number}: id {row['id']!r} is not unique")
        probabilities = row.get("probabilities") or ()
        if not isinstance(probabilities, list | tuple) or not _are_numbers(probabilities):
            raise UserError(f"{file}: line {number}: a probability is not a finite number")
        seen.add(row["id"])
        rows.append(row)
    return rows


def _are_numbers(values: Iterable[Any]) -> bool:
    return all(map(is_finite_number, values))
