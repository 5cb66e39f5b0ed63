"""What do OpenMP's waiting threads cost, asleep and spinning, alone and beside other work?

    python benchmarks/idle_threads.py
    python benchmarks/idle_threads.py --jobs 6 --rounds 3

Runs the recipe opinions_tiny for a few steps with threads that sleep after 2,000 spins, as scripts let them on machines
without a GPU, and after OpenMP's own 300,000, in turns: on a machine that has nothing else to do, and beside `jobs`
processes that compute. `ratio` is the time with spinning threads over the time with sleeping ones, in each of the two.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
COMPUTE = "while True: sum(range(100_000))"
SPINS = {"sleeping": "2000", "spinning": "300000"}


def main() -> None:
    """Both machines, both policies, and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=6, help="processes that compute beside it (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    given = parser.parse_args()
    found: dict[str, float] = {}
    for place, jobs in (("quiet", 0), ("busy", given.jobs)):
        seconds: dict[str, list[float]] = {name: [] for name in SPINS}
        with beside(jobs):
            for _ in range(given.rounds):
                for name, spins in SPINS.items():
                    seconds[name].append(run_seconds(spins, given.steps))
        for name, values in seconds.items():
            found[f"{place}_{name}_seconds"] = statistics.median(values)
            print(f"{place:6} {name:9} {statistics.median(values):7.1f} s  ({min(values):.1f} to {max(values):.1f})")
        found[f"{place}_ratio"] = found[f"{place}_spinning_seconds"] / found[f"{place}_sleeping_seconds"]
    facts = {"cores": os.cpu_count(), "instructions": torch.backends.cpu.get_cpu_capability(), "jobs": given.jobs}
    print(json.dumps({"benchmark": "idle_threads", **facts, **found, "ratio": found["busy_ratio"]}))


@contextlib.contextmanager
def beside(jobs: int) -> Iterator[None]:
    """Within it so many processes compute."""
    processes = [subprocess.Popen([sys.executable, "-c", COMPUTE]) for _ in range(jobs)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def run_seconds(spins: str, steps: int) -> float:
    """Seconds of one whole run, imports included."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = str(ROOT / "train" / "configs" / "opinions_tiny.yaml")
        flags = ["--config", recipe, "--output_dir", f"{folder}/run", "--max_steps", str(steps), "--disable_tqdm"]
        environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        started = time.perf_counter()
        subprocess.run(
            [sys.executable, str(ROOT / "train" / "imdb.py"), *flags],
            env={**environment, "GOMP_SPINCOUNT": spins, "ISOTUNE_CACHE": f"{folder}/cache"},
            stdout=subprocess.DEVNULL,
            check=True,
        )
        return time.perf_counter() - started


if __name__ == "__main__":
    main()
