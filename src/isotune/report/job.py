"""The summary at the end of a job's log: nodes, engine, speed, cost and restarts.

python -m isotune.report.job RUN
"""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from isotune.io.errors import UserError, run_script
from isotune.io.reading import Unreadable
from isotune.io.run_files import read_attempt, read_environment, read_status
from isotune.run.metrics_file import METRICS, read_metrics
from isotune.run.run_lease import ATTEMPT_RECORD, ATTEMPTS_DIR, last_heartbeat


def job_report(run: Path) -> str:
    """The lines of a run's summary; raises UserError if the folder has no run that has started.

    The cost counts each attempt from its start to its end, or to its last heartbeat if it was killed, times processes.
    """
    try:
        environment, status = read_environment(run), read_status(run)
        steps = read_metrics(run / METRICS).steps
    except (FileNotFoundError, Unreadable) as error:
        raise UserError(f"{run} holds no run that has begun: {error}") from error
    lacks = [name for name in ("in_effect", "world_size", "device", "device_name") if name not in environment]
    if lacks or "engine" not in environment["in_effect"] or "status" not in status:
        missing = lacks[0] if lacks else "in_effect.engine" if "status" in status else "status of status.json"
        raise UserError(f"{run} holds no run that has begun: it does not say {missing}")
    in_effect = environment["in_effect"]
    stage = in_effect.get("zero_stage")
    engine = in_effect["engine"] + (f", ZeRO-{stage}" if stage is not None else "")
    seconds, tokens = steps.total("step_seconds"), steps.total("input_tokens")
    attempts = list(_attempts(run))
    hours = sum(seconds * (record.get("processes") or environment["world_size"]) for record, seconds in attempts) / 3600
    hosts = f" (led by {', '.join(record['host'] for record, _ in attempts)})" if len(attempts) > 1 else ""
    hours_of = "GPU" if environment["device"] == "cuda" else "process"
    rows = {
        "run": run.resolve(),
        "ended": f"{status['status']} after step {max(steps, default=0)}",
        "nodes": (environment.get("slurm") or {}).get("nodes", "this machine"),
        "engine": f"{engine} on {environment['world_size']} x {environment['device_name']}",
        "speed": f"{tokens / seconds:,.0f} tokens/s over {seconds:,.0f} s of steps" if seconds else "no step",
        "cost": f"{hours:,.2f} {hours_of} hours, start-up and stopped attempts included",
        "restarts": f"{len(attempts) - 1}{hosts}",
    }
    return "".join(f"{name:<12}{value}\n" for name, value in rows.items())


def _attempts(run: Path) -> Iterator[tuple[dict[str, Any], float]]:
    """The record and the seconds of every attempt of the run, the first one first."""
    for folder in sorted((run / ATTEMPTS_DIR).glob("[0-9]*")):
        try:
            record = read_attempt(folder / ATTEMPT_RECORD)
        except (FileNotFoundError, Unreadable):
            continue
        if "began" not in record:
            continue
        ended = record.get("ended") or last_heartbeat(folder) or record["began"]
        yield record, max(min(ended, time.time()) - record["began"], 0.0)


def main() -> None:
    """Print the summary of the run folder on the command line."""
    if len(sys.argv) != 2:
        raise UserError("usage: python -m isotune.report.job RUN")
    print(job_report(Path(sys.argv[1])), end="")


if __name__ == "__main__":
    run_script(main)
