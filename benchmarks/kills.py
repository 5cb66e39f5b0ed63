"""Does a run that is killed at any moment, again and again, end with the bits of one that is not?

    python benchmarks/kills.py                          # until 20 kills are on record
    python benchmarks/kills.py --kills 1000             # goes on until 1,000 are; can be stopped and started again
    python benchmarks/kills.py --seed 3 --repeat 17     # run 17 of seed 3 once more, not recorded
    python benchmarks/kills.py --kills 0 --write docs/checkpoints.md    # the table of what is on record, in a page

Real runs of a tiny model with dropout (12 steps, a checkpoint every 2, an evaluation every 4), plain and under
`accelerate launch` as DDP, ZeRO-2 and FSDP2 on 2 processes. Each is started by the same command until it is finished,
and several of its attempts are killed in a drawn phase:

    start, preparation, step, evaluation         a moment between the phase's beginning and its usual end
    run files, checkpoint files, manifest,       an event: a file opened, half a write done, a rename, a removal,
    publication, metrics.jsonl, status.json,     a new folder; publication is a checkpoint's rename into place and the
    model, finishing, export                     removal of older ones

by SIGKILL of one rank or of all processes, SIGTERM at a rank or at the launcher, SIGSTOP and then SIGKILL of a rank, or
SIGKILL of the launcher. Before some attempts a file of the newest checkpoint is truncated or has a bit flipped, or an
attempt is made on a disk with too little room (a tmpfs, so only root has this kind).

After each attempt no process is left, and what status.json and `isotune runs` say of the run must be so. In the end
model, lines of metrics.jsonl (but for times), tensors of the optimizer and the state beside them must be bitwise those
of an undisturbed run of the same engine, and nothing half written may be left. A run that fails keeps its folder in
OUTPUT_DIR/failures. Linux without a GPU.
"""

import argparse
import functools
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from kills import forks
from kills.attempts import Attempts, KilledRun, make_reference
from kills.drawing import draw_run
from kills.harm import small_disk
from kills.material import make_model
from kills.record import Record, table, write_table

from isotune.run.malloc_tuning import restart_with_malloc_tuning

FIXED = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def main() -> int:
    """Kill until enough is on record; print the table and the JSON line. Status 1 where a run failed."""
    given = read_arguments()
    if not forks.can_fork():
        print(json.dumps({"benchmark": "kills", "left_out": "its processes are forks: Linux without a GPU"}))
        return 0
    os.environ.update(FIXED)
    output = given.output_dir.resolve()
    output.mkdir(parents=True, exist_ok=True)
    record = Record(output / f"kills-{given.seed}.jsonl")
    if given.repeat is not None or len(record.kills) < given.kills:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # unmounts the disk
        forks.preload()
        with small_disk(output / "disk") as is_mounted:
            kill_runs(given, record, output, output / "disk" if is_mounted else None)
    if given.repeat is not None:
        return 0
    print(table(record))
    if given.write:
        write_table(given.write, table(record))
    failed = sorted(number for number, line in record.runs.items() if line["problems"])
    result = {"benchmark": "kills", "seed": given.seed, "kills": len(record.kills), "runs": len(record.runs)}
    result |= {"equal": sum(line["result"] == "equal" for line in record.runs.values()), "failed_runs": failed}
    print(json.dumps(result))
    return 1 if failed else 0


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="goes on until so many are on record (20)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/kills"))
    parser.add_argument("--stop_after_seconds", type=float, default=0.0, help="then begin no other run (0: never)")
    parser.add_argument("--repeat", type=int, metavar="RUN", help="this run alone; it is not recorded")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="replace the table in this page")
    return parser.parse_args()


def kill_runs(given: argparse.Namespace, record: Record, output: Path, disk: Path | None) -> None:
    """One run after the other."""
    model, began = output / "model", time.monotonic()
    if not model.is_dir():
        forks.run_alone(lambda: make_model(model), output / "model.log")
    if disk is None:
        print("no disk is ever full: only root can mount a small one", flush=True)
    number = given.repeat if given.repeat is not None else len(record.runs)
    while given.repeat is not None or len(record.kills) < given.kills:
        if given.stop_after_seconds and time.monotonic() - began > given.stop_after_seconds:
            return
        plan, key, started = draw_run(given.seed, number), {"seed": given.seed, "run": number}, time.monotonic()
        reference = make_reference(plan.engine, output / "reference" / plan.engine, model)
        attempts = Attempts(plan.engine, (disk or output / "runs") / f"run-{number}", output / f"logs-{number}", model)
        add: Callable[..., object] = print if given.repeat is not None else record.add
        tell = functools.partial(_add, add, key)
        ended = KilledRun(plan, attempts, reference, disk, tell).carry_out()
        line = {**key, **ended, "seconds": round(time.monotonic() - started, 1)}
        add(line)
        show(line, attempts, output)
        if given.repeat is not None:
            return
        number += 1


def _add(add: Callable[..., object], key: dict, line: dict) -> None:
    add({**key, **line})


def show(line: dict, attempts: Attempts, output: Path) -> None:
    """Say how a run ended, and keep the folder of one that failed."""
    number = line["run"]
    print(f"run {number:<5} {line['engine']:<6} {line['attempts']} attempts in {line['seconds']} s: {line['result']}")
    if line["problems"]:
        kept = output / "failures" / f"run-{number}"
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(attempts.folder, kept)
        shutil.copytree(attempts.logs, kept / "logs")
        print("".join(f"      {problem}\n" for problem in line["problems"]), end="")
        print(f"      kept in {kept}; again: python benchmarks/kills.py --seed {line['seed']} --repeat {number}")
    sys.stdout.flush()
    shutil.rmtree(attempts.folder)
    shutil.rmtree(attempts.logs)


if __name__ == "__main__":
    restart_with_malloc_tuning()
    sys.exit(main())
