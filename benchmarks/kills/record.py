"""The record of the kills, a line each, and the table that is made of it."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kills.drawing import HARMS, KINDS, PHASES

BEGIN, END = "<!-- kills: begin -->\n", "<!-- kills: end -->\n"


class Record:
    """A file of JSON lines; those of a run that has no line of its end are not counted, and the run is made again."""

    def __init__(self, file: Path) -> None:
        self.file = file
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
        self.runs: dict[int, dict[str, Any]] = {line["run"]: line for line in lines if "result" in line}
        by_attempt = {(line["run"], line["attempt"]): line for line in lines if "attempt" in line}
        self._attempts = by_attempt

    def add(self, line: dict[str, Any]) -> None:
        """Append a line, which is on the disk when this returns."""
        with self.file.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if "result" in line:
            self.runs[line["run"]] = line
        else:
            self._attempts[line["run"], line["attempt"]] = line

    @property
    def attempts(self) -> list[dict[str, Any]]:
        """Those of the runs that are over."""
        return [line for (run, _), line in sorted(self._attempts.items()) if run in self.runs]

    @property
    def kills(self) -> list[dict[str, Any]]:
        """The attempts among them that were killed."""
        return [line for line in self.attempts if line["reached"] is not None]


def table(record: Record) -> str:
    """Markdown: kills by phase and kind, and what became of their runs."""
    heads = ["phase", *KINDS, "runs", "bitwise equal", "status true", "failures"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for phase in PHASES:
        lines.append(_row(phase, [kill for kill in record.kills if kill["phase"] == phase], record))
    lines.append(_row("all", record.kills, record))
    engines = Counter(kill["engine"] for kill in record.kills)
    by_engine = ", ".join(f"{engine} {number}" for engine, number in sorted(engines.items()))
    harms = Counter(line["harm"] for line in record.attempts if line["harm_done"])
    done = ", ".join(f"{harm} {harms[harm]}" for harm in HARMS)
    lines += ["", f"Kills by engine: {by_engine}. Between attempts: {done}."]
    return "\n".join(lines) + "\n"


def _row(name: str, kills: Sequence[dict[str, Any]], record: Record) -> str:
    kinds = Counter(kill["kind"] for kill in kills)
    runs = {kill["run"] for kill in kills}
    equal = sum(record.runs[run]["result"] == "equal" for run in runs)
    true = sum(not kill["untruths"] for kill in kills)
    hung = sum(kill["exit_status"] is None for kill in kills)
    failures = sum(record.runs[run]["result"] != "equal" for run in runs) + len(kills) - true + hung
    cells = [name, *(str(kinds[kind]) for kind in KINDS), str(len(runs)), str(equal), str(true), str(failures)]
    return f"| {' | '.join(cells)} |"


def write_table(page: Path, text: str) -> None:
    """Replace what is between the marks of a page."""
    before, rest = page.read_text("utf-8").split(BEGIN)
    _, after = rest.split(END)
    page.write_text(f"{before}{BEGIN}{text}{END}{after}", "utf-8")
