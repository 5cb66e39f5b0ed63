"""The file of predictions, which is there whole or not at all, and what is kept of it until all rows are predicted.

    predictions.csv             the lines in the order of the rows
    predictions.csv.json        what made them, and how many rows were left out or cut
    .predictions.csv.parts/     while rows are predicted: what makes them (facts.json), and the lines of the parts

A part takes its name when it is whole. So predictions that were killed go on behind the last whole part, and what is
made by another model, of other rows or with other settings is refused.
"""

import csv
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, TextIO

from filelock import FileLock, Timeout
from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict

from isotune.data.sources.text_files import is_formula
from isotune.evaluation.prediction.predictors import LEFT_OUT, Line, Part
from isotune.io.errors import AlreadyDone, UserError
from isotune.io.files import replace_file, replacing
from isotune.io.reading import Unreadable, checked, parse_json, read_text
from isotune.io.run_files import MAX_LINES_BYTES

CSV, JSONL = ".csv", ".jsonl"
FACTS = "facts.json"
NAMES = ("dataset_name", "model")  # are recorded, and decide nothing: contents do


class _KeptPart(TypedDict):
    """A file of the lines of some rows."""

    rows: Annotated[int, Field(ge=1)]
    counts: dict[str, int]
    lines: list[dict[str, Any]]


_PART_SCHEMA = TypeAdapter(_KeptPart)


@dataclass(frozen=True)
class Written:
    """What became of the rows."""

    rows: int
    counts: Mapping[str, int]  # rows by what was done to them
    left_out: Mapping[str, int]  # rows without a prediction by their reason


class PredictionFile:
    """Takes the lines of rows part by part; `facts` are all that decides them. One process writes it."""

    def __init__(self, output: Path, facts: dict[str, Any], id_column: str) -> None:
        self.output, self.facts, self.id_column = output, json.loads(json.dumps(facts)), id_column
        self.parts = output.with_name(f".{output.name}.parts")
        self.about = output.with_name(f"{output.name}.json")
        self._open = ExitStack()

    def start(self) -> int:
        """How many rows are predicted already; AlreadyDone where all are, UserError for what is not of these facts."""
        there = _made_of(self.about)
        if self.output.exists() and there is not None and not self._difference(there):
            raise AlreadyDone(f"{self.output} holds these predictions: nothing is left to do")
        if self.about.exists() and there is None and not self.output.exists():
            raise UserError(f"--output {self.output} would take the place of {self.about} too: choose another file")
        kept = _read(self.parts / FACTS)
        if self.output.exists() and not (kept and not self._difference(kept)):
            what = f"other predictions ({self._difference(there)})" if there else "something else"
            raise UserError(f"--output {self.output} holds {what}: choose another file, or remove it")
        if kept and (difference := self._difference(kept)):
            raise UserError(
                f"{self.parts} holds the first rows of other predictions ({difference}): remove that folder to begin "
                "again, or choose another --output"
            )
        self.parts.mkdir(parents=True, exist_ok=True)
        try:
            self._open.enter_context(FileLock(self.parts / "lock", timeout=0))
        except Timeout:
            raise UserError(f"another process writes {self.output}: wait for it, or choose another --output") from None
        if not kept:  # parts whose facts are gone may be of anything
            for part in self.parts.glob("part-*.json"):
                part.unlink()
        replace_file(self.parts / FACTS, json.dumps(self.facts, indent=2) + "\n")
        return sum(int(part["rows"]) for part in self._whole_parts())

    def add(self, first: int, part: Part) -> None:
        """Keep the lines of the rows from number `first` on."""
        content = {"rows": len(part.lines), "counts": part.counts, "lines": part.lines}
        replace_file(self.parts / _name(first), json.dumps(content))

    def finish(self, flat: Callable[[Line], Line]) -> Written:
        """Write all lines to the file; `flat` makes the cells of a line for a table."""
        counts, left_out, rows = Counter[str](), Counter[str](), 0
        columns: dict[str, None] = {self.id_column: None}
        for part in self._whole_parts():
            counts.update(part["counts"])
            rows += int(part["rows"])
            left_out.update(line[LEFT_OUT] for line in part["lines"] if LEFT_OUT in line)
            if len(columns) == 1:
                predicted = next((line for line in part["lines"] if LEFT_OUT not in line), {})
                columns |= dict.fromkeys(flat(predicted) if predicted else ())
        columns |= {LEFT_OUT: None} if left_out else {}
        lines = (line for part in self._whole_parts() for line in part["lines"])
        with replacing(self.output) as unfinished, unfinished.open("w", encoding="utf-8", newline="") as file:
            if self.output.suffix == CSV:
                table = csv.writer(_Lines(file), lineterminator=_Lines.END)
                table.writerow(map(_cell, columns))
                for line in lines:
                    cells = line | ({} if LEFT_OUT in line else flat(line))
                    table.writerow(_cell(cells.get(name)) for name in columns)
            else:
                file.writelines(json.dumps(line) + "\n" for line in lines)
        written = Written(rows, dict(counts), dict(left_out))
        about = {"made_of": self.facts, "rows": rows, "left_out": written.left_out, "counts": written.counts}
        replace_file(self.about, json.dumps(about, indent=2) + "\n")
        shutil.rmtree(self.parts)
        self.close()
        return written

    def close(self) -> None:
        """Let another process write."""
        self._open.close()

    def _whole_parts(self) -> Iterator[dict[str, Any]]:
        """The parts from the first row on, without a gap; one that is none is a gap."""
        first = 0
        while part := _read(self.parts / _name(first)):
            try:
                checked(part, _PART_SCHEMA)
            except Unreadable:
                return
            yield part
            first += int(part["rows"])

    def _difference(self, there: Mapping[str, Any]) -> str:
        """The first of the facts that is another one there; empty where all are the same."""
        names = [name for name in {**there, **self.facts} if name not in NAMES]
        differs = next((name for name in names if there.get(name) != self.facts.get(name)), None)
        if differs is None:
            return ""
        if differs in ("data", "model_sha256"):
            return f"of other {'rows' if differs == 'data' else 'weights'}"
        return (
            f"{differs}: {json.dumps(there.get(differs))[:60]} there, {json.dumps(self.facts.get(differs))[:60]} here"
        )


@dataclass(frozen=True)
class _Lines:
    """A text file whose CSV lines end in a line feed. A cell with a part of END is quoted, and csv needs both."""

    END: ClassVar[str] = "\r\n"
    file: TextIO

    def write(self, line: str) -> None:
        """One line of the table."""
        self.file.write(line.removesuffix(self.END) + "\n")


def check_output(output: Path) -> Path:
    """The path of a file of predictions; UserError where its name says no form that is written."""
    if output.suffix not in (CSV, JSONL):
        raise UserError(f"--output {output} ends in neither {CSV} nor {JSONL}")
    if output.is_dir():
        raise UserError(f"--output {output} is a folder")
    return output


def _name(first: int) -> str:
    return f"part-{first:012}.json"


def _read(file: Path) -> dict[str, Any]:
    """A JSON object of a file; an empty one where there is no such file, or it is of something else."""
    try:
        content = parse_json(read_text(file, MAX_LINES_BYTES))
    except (FileNotFoundError, Unreadable):
        return {}
    return content if isinstance(content, dict) else {}


def _made_of(file: Path) -> dict[str, Any] | None:
    """What made the predictions that a file of facts stands beside; None where it does not say so."""
    there = _read(file).get("made_of")
    return there if isinstance(there, dict) else None


def _cell(value: Any) -> Any:
    """Numbers with all digits, lists and truths as JSON writes them, texts so that no spreadsheet computes them."""
    if isinstance(value, str):
        return f"'{value}" if is_formula(value.lstrip("'")) else value
    return json.dumps(value) if isinstance(value, list | bool | float) else value
