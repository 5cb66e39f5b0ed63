"""What a job has done, in a few lines at the end of its log: where it ran, how fast, for how long, what it cost.

python -m isotune.report.job RUN
"""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from isotune.io.errors import UserError, run_script
from isotune.report.metrics_lines import METRICS, read_metrics
from isotune.run.run_lease import ATTEMPT_RECORD, ATTEMPTS_DIR, last_heartbeat


def job_report(run: Path) -> str:
    """The lines of a run's report: engine, steps, speed, lives and where it lies.

    Hours are counted from the moment a life took the run folder to its end, or to its last heartbeat where it was
    killed, times its processes.

    Raises:
        UserError: the folder holds no run that has begun.
    """
    try:
        environment = json.loads((run / "environment.json").read_text("utf-8"))
        status = json.loads((run / "status.json").read_text("utf-8"))
        steps = list(read_metrics(run / METRICS).steps.values())
    except (OSError, ValueError) as error:
        raise UserError(f"{run} holds no run that has begun: {error}") from error
    found = environment["in_effect"]
    engine = found["engine"] + (f", ZeRO-{found['zero_stage']}" if found.get("zero_stage") is not None else "")
    seconds = sum(line["step_seconds"] for line in steps)
    tokens = sum(line["input_tokens"] for line in steps)
    lives = list(_lives(run))
    on_gpu = environment["device"] == "cuda"
    hours = sum(life["seconds"] * (life["processes"] or environment["world_size"]) for life in lives) / 3600
    slurm = environment.get("slurm") or {}
    rows = {
        "run": run.resolve(),
        "ended": f"{status['status']} after step {len(steps)}",
        "nodes": slurm.get("nodes", "this machine"),
        "engine": f"{engine} on {environment['world_size']} x {environment['device_name']}",
        "speed": f"{tokens / seconds:,.0f} tokens/s over {seconds:,.0f} s of steps" if seconds else "no step",
        "cost": f"{hours:,.2f} {'GPU' if on_gpu else 'process'} hours, start-up and lives that were stopped included",
        "restarts": f"{len(lives) - 1}{_said_of(lives)}",
    }
    return "".join(f"{name:<12}{value}\n" for name, value in rows.items())


def _said_of(lives: list[dict[str, Any]]) -> str:
    """On which machines, where there was more than one life."""
    return f" (led by {', '.join(life['host'] for life in lives)})" if len(lives) > 1 else ""


def _lives(run: Path) -> Iterator[dict[str, Any]]:
    """Every life of the run, from the first: host, processes, seconds."""
    for folder in sorted((run / ATTEMPTS_DIR).glob("[0-9]*")):
        try:
            record = json.loads((folder / ATTEMPT_RECORD).read_text("utf-8"))
        except (OSError, ValueError):
            continue
        ended = record.get("ended") or last_heartbeat(folder) or record["began"]
        seconds = max(min(ended, time.time()) - record["began"], 0.0)
        yield {"host": record["host"], "processes": record.get("processes"), "seconds": seconds}


def main() -> None:
    """Print the report of the folder that was named."""
    if len(sys.argv) != 2:
        raise UserError("usage: python -m isotune.report.job RUN")
    print(job_report(Path(sys.argv[1])), end="")


if __name__ == "__main__":
    run_script(main)
