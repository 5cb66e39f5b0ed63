"""What do exact gradients cost, in time and in memory?

    python benchmarks/exact_gradients_cost.py
    python benchmarks/exact_gradients_cost.py --layers 2 --rounds 2     # a quick look

The step of `sft_throughput.py` (OPT-350M's geometry, full rows of real Guanaco, the shipped recipes) on one process,
with `exact_gradients: true` and with `false`, each in a process of its own, in turns, in the opposite order every other
round. `ratio` is the median over the rounds of the time with them over the time without.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from sft_sides.parent import Side, data_arguments, require_data


def main() -> int:
    """Run the rounds of every mode, and print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", nargs="+", choices=("lora", "full"), default=["lora", "full"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps_per_round", type=int, default=2)
    parser.add_argument("--rows_per_step", type=int, default=1)
    parser.add_argument("--layers", type=int, default=24, help="fewer for a quick look")
    data_arguments(parser)
    given = parser.parse_args()
    given.gradient_checkpointing, given.rows_per_pass = False, given.rows_per_step
    require_data(parser, given)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    result: dict[str, Any] = {"benchmark": "exact_gradients_cost", "layers": given.layers}
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["ISOTUNE_CACHE"] = scratch
        for mode in given.modes:
            result[mode] = measure(mode, given, scratch)
            found = result[mode]
            print(f"{mode}: {found['seconds_with']:.3f} s with, {found['seconds_without']:.3f} s without, ", end="")
            print(f"ratio {found['ratio']:.3f}; {found['bytes_more'] / 1e6:,.0f} MB more at the peak", flush=True)
    print(json.dumps(result))
    return 0


def measure(mode: str, given: argparse.Namespace, scratch: str) -> dict[str, Any]:
    """Seconds a step and peak memory, with and without."""
    sides: dict[bool, Side] = {}
    seconds: dict[bool, list[float]] = {True: [], False: []}
    peaks = {True: 0, False: 0}
    try:
        for exact in (True, False):
            folder = Path(scratch) / f"exact-{exact}"
            folder.mkdir(exist_ok=True)
            with_key = argparse.Namespace(**vars(given), exact_gradients=exact)
            sides[exact] = Side("isotune", mode, with_key, str(folder))
            sides[exact].steps(2 * given.steps_per_round)  # first touches, moments of AdamW
        for number in range(given.rounds):
            for exact in (True, False) if number % 2 else (False, True):
                answer = sides[exact].steps(given.steps_per_round)
                seconds[exact].append(sum(answer["seconds"]) / given.steps_per_round)
                peaks[exact] = max(peaks[exact], answer["peak_memory_bytes"])
    finally:
        for side in sides.values():
            side.close()
    ratios = [with_it / without for with_it, without in zip(seconds[True], seconds[False], strict=True)]
    return {
        "seconds_with": statistics.median(seconds[True]),
        "seconds_without": statistics.median(seconds[False]),
        "ratio": statistics.median(ratios),
        "ratio_least": min(ratios),
        "ratio_most": max(ratios),
        "peak_bytes_with": peaks[True],
        "peak_bytes_without": peaks[False],
        "bytes_more": peaks[True] - peaks[False],
    }


if __name__ == "__main__":
    sys.exit(main())
