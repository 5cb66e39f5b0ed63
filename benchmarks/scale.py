"""How does what grows with the size of a run behave at a hundred times the usual size?

    python benchmarks/scale.py                                  # every part, each in a process of its own
    python benchmarks/scale.py --parts report schedule --share 0.01

Parts: the report of a run of 1,000,000 steps; the comparison of 20 runs of 100,000 rows; 1,000 checkpoints in a folder;
the plan of a launch of 4,096 processes; the packing of 10,000,000 documents; the schedule of 100,000,000 documents on
4,096 ranks. `--share` makes the data smaller, not the number of runs, checkpoints or ranks. Each part prints seconds of
processor time and the peak of memory; the limits are those that the project holds itself to.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

LIMITS = {"report": {"seconds": 10.0, "peak_megabytes": 500.0}}
RANKS = 4_096
STEPS_MEASURED = 3


def report(share: float, scratch: Path) -> Callable[[], dict[str, Any]]:
    """A page of one run with a line for each of its steps."""
    from isotune.report.html_report import write_report

    steps, run = round(1_000_000 * share), scratch / "run"
    run.mkdir()
    with (run / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            line = {"step": step, "epoch": step / steps, "loss": 2 + 1 / step, "grad_norm": 1.2345678901234}
            line |= {"learning_rate": 1.9999e-5, "supervised_tokens": 1234, "input_tokens": 4321, "documents": 16}
            line |= {"step_seconds": 0.123456789, "tokens_per_second": 35001.2345678, "peak_memory_bytes": 123456789}
            file.write(json.dumps(line) + "\n")

    def measured() -> dict[str, Any]:
        write_report([run], scratch / "page.html")
        return {"steps": steps}

    return measured


def compare(share: float, scratch: Path) -> Callable[[], dict[str, Any]]:
    """Each of 20 runs with the first one, on the same rows."""
    from isotune.evaluation.comparison import compare_runs
    from isotune.evaluation.results import write_aligned_result
    from isotune.evaluation.statistics.resampling import Scores

    rows, labels = round(100_000 * share), np.random.default_rng(0).integers(0, 3, round(100_000 * share))
    runs = [scratch / f"run-{number}" for number in range(20)]
    for number, run in enumerate(runs):
        scores = np.exp(np.random.default_rng(number + 1).normal(size=(rows, 3)) + np.eye(3)[labels])
        shares = (scores / scores.sum(axis=1, keepdims=True)).tolist()
        predictions = [
            {"id": row, "label": label, "probabilities": own}
            for row, (label, own) in enumerate(zip(labels.tolist(), shares, strict=True))
        ]
        facts = {"kind": "classification", "model": str(run), "dataset_name": "drawn", "dataset_split": "test"}
        write_aligned_result(run / "eval" / "test", facts, Scores({}, {}), predictions, "of the same rows")

    def measured() -> dict[str, Any]:
        compare_runs(runs)
        return {"runs": len(runs), "rows": rows}

    return measured


def checkpoints(share: float, scratch: Path) -> Callable[[], dict[str, Any]]:
    """The newest valid one of 1,000, and the removal of the oldest."""
    from isotune.checkpoint.manifest import Manifest
    from isotune.checkpoint.store import CheckpointStore, name_of

    for step in range(1, 1_001):
        folder = scratch / name_of(step)
        folder.mkdir()
        (folder / "state.json").write_text(json.dumps({"step": step}))
        manifest = Manifest(
            step=step, world_size=1, engine="plain", recipe={}, data_fingerprints={}, recipe_fingerprint="",
            contents={}, versions={}, best_step=None, best_metric=None,
        )  # fmt: skip
        manifest.write(folder)

    def measured() -> dict[str, Any]:
        store = CheckpointStore(scratch, limit=999)
        store.clean()
        newest = store.newest_valid()
        assert newest.folder is not None and newest.folder.name == name_of(1_000)
        store.prune(1_000, None)
        return {"checkpoints": 1_000, "kept": len(store.folders())}

    return measured


def plan(share: float, scratch: Path) -> Callable[[], dict[str, Any]]:
    """`isotune plan` for DDP on 4,096 processes."""
    from isotune.config import Recipe
    from isotune.preflight.preflight_report import run_preflight
    from isotune.preflight.request import PreflightRequest, shipped_launch

    values = {"model_name_or_path": "builtin:opt-tiny", "dataset_name": "builtin:greetings", "tune": "full"}
    recipe = Recipe.from_values(**values, max_seq_length=256, output_dir=str(scratch / "run"), max_steps=10)

    def measured() -> dict[str, Any]:
        run_preflight(PreflightRequest(recipe, shipped_launch("ddp", RANKS), ()), limit=80 * 2**30, show_progress=False)
        return {"processes": RANKS}

    return measured


def _lengths(documents: int) -> np.ndarray:
    """Log-normal lengths in tokens like those of conversations, int64 [documents]."""
    drawn = np.random.default_rng(0).lognormal(6.0, 0.85, documents)
    return np.clip(drawn.round(), 2, 1_024).astype(np.int64)


def packing(share: float, scratch: Path) -> Callable[[], dict[str, Any]]:
    """Rows of 1,024 tokens of 10,000,000 documents."""
    from isotune.data.packing import pack

    lengths = _lengths(round(10_000_000 * share))

    def measured() -> dict[str, Any]:
        rows = pack(lengths, 1_024, seed=0)
        return {"documents": len(lengths), "rows": len(rows), "tokens_used": lengths.sum() / (1_024 * len(rows))}

    return measured


def schedule(share: float, scratch: Path) -> Callable[[], dict[str, Any]]:
    """Steps of four rows a rank, as every rank lays them out."""
    from isotune.data.batch_schedule import StepSchedule, share_of_rank
    from isotune.data.packing import one_document_per_row

    lengths = _lengths(round(100_000_000 * share))
    documents: Any = SimpleNamespace(lengths=lengths, supervised_counts=lengths)
    batch = min(4 * RANKS, len(lengths))

    def measured() -> dict[str, Any]:
        laid = StepSchedule(
            documents, one_document_per_row(len(lengths)), global_batch_size=batch, microbatch_tokens=8_192,
            ranks=RANKS, seed=0,
        )  # fmt: skip
        laid.step(0)
        started = time.process_time()
        steps = [laid.step(number) for number in range(1, 1 + STEPS_MEASURED)]
        own = [share_of_rank(step, RANKS, RANKS // 2) for step in steps]
        milliseconds = (time.process_time() - started) / STEPS_MEASURED * 1e3
        assert all(own), "every rank has its four rows"
        microbatches = steps[0].microbatches
        loads = np.bincount(np.asarray(microbatches.ranks), microbatches.costs, RANKS)
        found = {"documents": len(lengths), "ranks": RANKS, "rows_per_step": batch}
        found |= {"milliseconds_per_step_and_rank": milliseconds, "imbalance": float(loads.max() / loads.mean())}
        return found | {"bytes_per_document": sum(a.nbytes for a in vars(laid).values() if isinstance(a, np.ndarray))
                        / len(lengths)}  # fmt: skip

    return measured


PARTS = {
    "report": report,
    "compare": compare,
    "checkpoints": checkpoints,
    "plan": plan,
    "packing": packing,
    "schedule": schedule,
}


def run_part(name: str, share: float) -> dict[str, Any]:
    """Make the data of a part, then measure it in this process."""
    with tempfile.TemporaryDirectory() as scratch:
        measured = PARTS[name](share, Path(scratch))
        started = time.process_time()
        found = measured()
        seconds = time.process_time() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    found = {"seconds": seconds, "peak_megabytes": peak, **found}
    over = {key: limit for key, limit in LIMITS.get(name, {}).items() if share >= 1 and found[key] > limit}
    return found | ({"over_the_limit": over} if over else {})


def main() -> None:
    """Each part in a process, so that its peak of memory is its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--share", type=float, default=1.0, help="of the data of each part")
    parser.add_argument("--here", action="store_true", help="the one part in this process")
    given = parser.parse_args()
    if given.here:
        print(json.dumps(run_part(given.parts[0], given.share)))
        return
    result: dict[str, Any] = {"benchmark": "scale", "share": given.share}
    for name in given.parts:
        command = [sys.executable, __file__, "--here", "--parts", name, "--share", str(given.share)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        result[name] = json.loads(done.stdout.splitlines()[-1])
        print(f"{name:<12} {json.dumps(result[name])}", flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
