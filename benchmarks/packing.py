"""How long do a million documents take to pack, and how full are the rows?

    python benchmarks/packing.py

Lengths are drawn log-normal with the median, mean and 95th percentile of Guanaco's conversations (404, 578 and 1,590
tokens) and clipped at the row's 1,024 tokens, as truncation does. Targets: 1 s, and 99.5% of the rows' tokens used.
"""

import argparse
import json
import math
import statistics
import time

import numpy as np

from isotune.data.packing import pack

MEDIAN_TOKENS, MEAN_TOKENS = 404, 578


def draw_lengths(documents: int, capacity: int) -> np.ndarray:
    """Log-normal lengths like Guanaco's, clipped to a row: int64 [documents]."""
    sigma = math.sqrt(2 * math.log(MEAN_TOKENS / MEDIAN_TOKENS))
    drawn = np.random.default_rng(0).lognormal(math.log(MEDIAN_TOKENS), sigma, documents)
    return np.clip(drawn.round(), 2, capacity).astype(np.int64)


def main() -> None:
    """Pack the same lengths several times and print the median."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--capacity", type=int, default=1_024)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()

    lengths = draw_lengths(given.documents, given.capacity)
    seconds, rows = [], None
    for round_number in range(given.rounds):
        started = time.perf_counter()
        rows = pack(lengths, given.capacity, seed=round_number)
        seconds.append(time.perf_counter() - started)
        print(f"round {round_number}: {seconds[-1]:.3f} s, {len(rows):,} rows")
    assert rows is not None
    assert rows.lengths(lengths).max() <= given.capacity
    assert np.array_equal(np.sort(rows.documents), np.arange(given.documents))
    result = {
        "benchmark": "packing",
        "documents": given.documents,
        "capacity": given.capacity,
        "rows": len(rows),
        "seconds": round(statistics.median(seconds), 4),
        "worst_seconds": round(max(seconds), 4),
        "efficiency": round(float(lengths.sum() / (len(rows) * given.capacity)), 6),
        "least_rows_possible": math.ceil(lengths.sum() / given.capacity),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
