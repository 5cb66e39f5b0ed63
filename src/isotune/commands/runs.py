"""`isotune runs FOLDER...`: the runs below folders with their true state, progress, best metric and age."""

import json
from collections.abc import Sequence
from pathlib import Path

from isotune.run.run_state import RunState, find_runs, state_of_run

WIDTH = 80  # of the table; the names of runs get what the other columns leave
HEADS = ("run", "state", "step", "best metric", "age")
AGES = ((86400, "d"), (3600, "h"), (60, "min"))


def list_runs(folders: Sequence[str], *, as_json: bool) -> None:
    """Print a line for each run, or a list in JSON; UserError where a folder is none."""
    places = [Path(folder).expanduser() for folder in folders]
    states = [state_of_run(run) for run in find_runs(places)]
    if as_json:
        print(json.dumps([state.as_dict() for state in states], indent=2))
    elif states:
        print("\n".join(runs_table(states)))
    else:
        print(f"no run below {', '.join(map(str, places))}")


def runs_table(states: Sequence[RunState]) -> list[str]:
    """The lines of the table, of at most WIDTH columns where the values are short; a long name loses its start."""
    rows = [HEADS, *(_row(state) for state in states)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADS))]
    widths[0] = min(widths[0], max(WIDTH - sum(widths[1:]) - 2 * (len(HEADS) - 1), 12))
    lines = []
    for run, *cells in rows:
        name = run if len(run) <= widths[0] else f"…{run[1 - widths[0] :]}"
        lines.append("  ".join(f"{cell:<{width}}" for cell, width in zip((name, *cells), widths, strict=True)).rstrip())
    return lines


def progress(state: RunState) -> str:
    """`12 of 60`, or `12` where no file says how many there are."""
    return f"{state.step:,} of {state.steps:,}" if state.steps is not None else f"{state.step:,}"


def best_metric(state: RunState) -> str:
    """`accuracy 0.9312`; empty without an evaluation."""
    return "" if state.best is None else f"{str(state.metric).removeprefix('eval_')} {state.best:.4g}"


def _row(state: RunState) -> tuple[str, ...]:
    cells = (state.run, state.state[:12], progress(state), best_metric(state), _age(state.age_seconds))
    return tuple(map(printable, cells))


def printable(cell: str) -> str:
    """A cell of one line that every terminal takes: `?` for control characters, and for bytes that are not UTF-8."""
    return "".join(letter if letter.isprintable() else "?" for letter in cell)


def _age(seconds: float) -> str:
    unit = next(((size, name) for size, name in AGES if seconds >= size), (1, "s"))
    return f"{int(seconds // unit[0])} {unit[1]}"
