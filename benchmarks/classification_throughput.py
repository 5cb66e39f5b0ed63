"""How many documents a second does classification train on, beside stock Trainer on the same documents?

    python benchmarks/classification_throughput.py
    python benchmarks/classification_throughput.py --data_sets imdb --sides trainer_default --rounds 2
    python benchmarks/classification_throughput.py --peer_batch 16     # where 32 padded reviews do not fit into memory

BERT-base's geometry with random weights, all of them trained, real reviews (IMDb, Yelp) of up to 512 tokens, steps of
32 documents, bf16, by the shipped recipes imdb_bert.yaml and yelp_bert.yaml. A step is a whole optimizer update: batch,
forward, backward, clipping, AdamW.

    isotune            build_model and build_trainer, as train/imdb.py calls them
    trainer_default    stock Trainer, DataCollatorWithPadding, batches in random order
    trainer_grouped    the same on the batches that its sampler `group_by_length` makes

In a round every side trains on the same documents once; `classification_sides/material.py` chooses them. Their tokens
are the same on every side, and so is the loss of the first 32, without dropout and before any update. A side is a
process that waits on a pipe between its rounds; the next round takes the sides in the opposite order. Ratios are taken
within a round, then their median. One peer at a time runs beside isotune: each keeps 1.8 GB of weights and moments
while it waits. Peak memory is that of the timed steps.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from sft_sides.parent import DATA, Side, SideFailed

PEERS = ("trainer_default", "trainer_grouped")
LOSS_TOLERANCE = 1e-3  # relative; bf16 attention rounds in another order, other documents would show


def main() -> int:
    """Run the rounds of every data set, print a table and the JSON line."""
    given = read_arguments()
    result: dict[str, Any] = {"benchmark": "classification_throughput", "layers": given.layers}
    result |= {"steps_per_round": given.steps_per_round, "rounds": given.rounds, "peer_batch": given.peer_batch}
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["ISOTUNE_CACHE"] = scratch
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        for data in given.data_sets:
            result[data] = {peer: beside(peer, data, given, scratch) for peer in given.sides}
            print_table(data, result[data])
    print(json.dumps(result))
    return 0


def read_arguments() -> argparse.Namespace:
    """The command line; ends with status 2 where the data are not there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_sets", nargs="+", choices=("imdb", "yelp"), default=["imdb", "yelp"])
    parser.add_argument("--sides", nargs="+", choices=PEERS, default=list(PEERS), help="peers beside isotune")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps_per_round", type=int, default=4)
    parser.add_argument("--layers", type=int, default=12, help="fewer for a quick look")
    parser.add_argument("--microbatch_tokens", type=int, default=8_192, help="the recipes' own")
    parser.add_argument(
        "--peer_batch", type=int, default=32, choices=(1, 2, 4, 8, 16, 32),
        help="documents in one pass of Trainer; with fewer than a step's 32 it accumulates (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--data", type=Path, default=DATA, help="folder that holds imdb/, yelp/ and tokenizers/")
    given = parser.parse_args()
    for needed in (*given.data_sets, "tokenizers"):
        if not (given.data / needed).is_dir():
            parser.error(f"{given.data / needed} is not there: set ISOTUNE_TEST_DATA or name another by --data")
    return given


def beside(peer: str, data: str, given: argparse.Namespace, scratch: str) -> dict[str, Any]:
    """isotune and one peer, in turns; what is reported of the pair."""
    modules = {"isotune": "classification_sides.isotune_side", peer: "classification_sides.trainer_side"}
    sides: dict[str, Side] = {}
    rounds: list[dict[str, float]] = []
    peaks = dict.fromkeys(modules, 0)
    try:
        for name, module in modules.items():
            sides[name] = Side(name, data, given, scratch, module)
            sides[name].steps(1)  # to warm up: first touches, moments of AdamW
        facts = {name: side.facts for name, side in sides.items()}
        check_equal_work(facts)
        for number in range(given.rounds):
            measured = {}
            for name in list(sides)[:: -1 if number % 2 else 1]:
                answer = sides[name].steps(given.steps_per_round)
                measured[name] = sum(answer["seconds"])
                peaks[name] = max(peaks[name], answer["peak_memory_bytes"])
            rounds.append(measured)
            shown = "  ".join(f"{name} {measured[name]:.1f}" for name in sides)
            print(f"{data} round {number}, seconds: {shown}", flush=True)
    except SideFailed as failure:
        sys.exit(f"{data}, beside {peer}: {failure}")
    finally:
        for side in sides.values():
            side.close()
    ratios = [r[peer] / r["isotune"] for r in rounds]
    return {
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "documents_per_second": {
            name: round(facts[name]["documents"] / statistics.median(r[name] for r in rounds), 3) for name in modules
        },
        "peak_memory_bytes": peaks,
        "first_loss": {name: round(facts[name]["loss"], 6) for name in modules},
        "mean_tokens": round(facts["isotune"]["tokens"] / facts["isotune"]["documents"], 1),
        "padding": round(1 - facts[peer]["tokens"] / facts[peer]["positions"], 4),
        "padding_of_an_epoch": round(facts[peer]["epoch_padding"], 4),
    }


def check_equal_work(facts: dict[str, dict[str, Any]]) -> None:
    """End the program where a side trains on other documents, or its loss is another."""
    ours, theirs = facts.values()
    for count in ("documents", "tokens"):
        if ours[count] != theirs[count]:
            sys.exit(f"a round has {theirs[count]} {count} for the peer and {ours[count]} for isotune")
    if abs(theirs["loss"] / ours["loss"] - 1) > LOSS_TOLERANCE:
        sys.exit(f"the loss of the same documents is {theirs['loss']} for the peer and {ours['loss']} for isotune")


def print_table(data: str, found: dict[str, Any]) -> None:
    """What a person reads."""
    print(f"\n{data}\n  {'beside':<18}{'documents/s':>12}{'isotune':>9}{'ratio':>7}", end="")
    print(f"{'peak GB':>9}{'isotune':>9}{'first loss':>12}{'isotune':>10}{'padding':>9}{'in an epoch':>13}")
    for peer, pair in found.items():
        rate, peak, loss = pair["documents_per_second"], pair["peak_memory_bytes"], pair["first_loss"]
        print(f"  {peer:<18}{rate[peer]:>12.2f}{rate['isotune']:>9.2f}{pair['ratio']:>7.2f}", end="")
        print(f"{peak[peer] / 1e9:>9.2f}{peak['isotune'] / 1e9:>9.2f}", end="")
        print(f"{loss[peer]:>12.5f}{loss['isotune']:>10.5f}{pair['padding']:>9.1%}{pair['padding_of_an_epoch']:>13.1%}")
    print(flush=True)


if __name__ == "__main__":
    sys.exit(main())
