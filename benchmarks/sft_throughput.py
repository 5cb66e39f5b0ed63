"""How fast is a step of instruction tuning, beside TRL's on the same rows and beside its matrix products alone?

    python benchmarks/sft_throughput.py
    python benchmarks/sft_throughput.py --modes lora --layers 2 --rounds 2     # a quick look
    python benchmarks/sft_throughput.py --rows_per_step 16                     # on a GPU
    python benchmarks/sft_throughput.py --rows_per_step 4 --rows_per_pass 1    # accumulates four microbatches

OPT-350M's geometry with random weights, real conversations (Guanaco's) in full rows of 1,024 tokens, bf16, by the
shipped recipes. A step is a whole optimizer update: batch, forward, backward, clipping, AdamW.

    isotune        build_model and build_trainer, as train/sft_opt.py calls them
    trl_stock      TRL's SFTTrainer, packed and hence padding-free, with its own loss
    trl_own_loss   the same, compute_loss overridden by the model's own loss
    trl_compiled   that with torch_compile
    drop_in        that script with isotune.SFTTrainer in place of TRL's; by --sides alone
    floor          the matrix products of the step alone: linear layers, adapters, attention within documents
    floor_linear   those of the linear layers alone

Every side trains on the same rows with the same supervised tokens. Each counts them itself, and the losses of a row of
one document, without dropout and before any update, are compared. (Rows of several documents cannot be compared: under
TRL's packing OPT's documents see each other.) No side recomputes activations, which TRL does by default; with
--gradient_checkpointing all sides do.

A side is a process that waits on a pipe between its rounds. In a round each side trains on the rows once, in turn; the
next round takes the sides in the opposite order. Ratios are taken within a round, then their median.
Peak memory is that of the timed steps, without building the model and compiling. On CUDA, model FLOPs utilisation
counts the products of `floor_linear` and causal attention within documents.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections import defaultdict
from typing import Any

from sft_sides.parent import Side, SideFailed, data_arguments, require_data

PEERS = ("trl_stock", "trl_own_loss", "trl_compiled")
DROP_IN = "drop_in"
FLOORS = ("floor", "floor_linear")
# Full tuning keeps 4 GB of weights and moments in each process while it waits, adapters 2 GB.
PEERS_AT_ONCE = {"lora": 3, "full": 1}
LOSS_TOLERANCE = 2e-4  # relative; bf16 rounds by a tenth of it, another choice of tokens would show


def main() -> int:
    """Run the rounds of every mode, print a table and the JSON line."""
    given = read_arguments()
    result: dict[str, Any] = {"benchmark": "sft_throughput", "layers": given.layers}
    result |= {"rows_per_step": given.rows_per_step, "rows_per_pass": given.rows_per_pass}
    result["gradient_checkpointing"] = given.gradient_checkpointing
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["ISOTUNE_CACHE"] = scratch
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        for mode in given.modes:
            result[mode] = measure_mode(mode, given, scratch)
            print_table(mode, result[mode])
    print(json.dumps(result))
    return 0


def read_arguments() -> argparse.Namespace:
    """The command line; ends with status 2 where the data are not there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", nargs="+", choices=("lora", "full"), default=["lora", "full"])
    parser.add_argument(
        "--sides", nargs="+", choices=(*PEERS, DROP_IN), default=list(PEERS), help="beside isotune and floor"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps_per_round", type=int, default=4)
    parser.add_argument("--rows_per_step", type=int, default=1)
    parser.add_argument("--rows_per_pass", type=int, help="fewer than --rows_per_step: the step has several passes")
    parser.add_argument("--layers", type=int, default=24, help="fewer for a quick look")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="recompute activations on every side")
    parser.add_argument("--peers_at_once", type=int, help="peers alive beside isotune; fewer need less memory")
    data_arguments(parser)
    given = parser.parse_args()
    given.rows_per_pass = given.rows_per_pass or given.rows_per_step
    if given.rows_per_step % given.rows_per_pass:
        parser.error("--rows_per_step must be a multiple of --rows_per_pass")
    require_data(parser, given)
    return given


def measure_mode(mode: str, given: argparse.Namespace, scratch: str) -> dict[str, Any]:
    """Everything that is reported of one mode.

    Where not all peers fit into memory at once, they take turns beside isotune and floor.
    """
    at_once = given.peers_at_once or PEERS_AT_ONCE[mode]
    groups = [given.sides[i : i + at_once] for i in range(0, len(given.sides), at_once)]
    rounds: list[dict[str, float]] = []  # seconds of a round by side
    peaks: dict[str, int] = defaultdict(int)
    facts: dict[str, dict[str, Any]] = {}
    dropped: dict[str, str] = {}
    for group in groups:
        sides: dict[str, Side] = {}
        try:
            for name in ("isotune", *FLOORS, *group):
                try:
                    sides[name] = Side(name, mode, given, scratch)
                    # one pass to warm up: first touches, moments of AdamW, compiling
                    sides[name].steps(given.steps_per_round)
                    facts[name] = sides[name].facts
                except SideFailed as failure:
                    if name not in PEERS:
                        sys.exit(f"{mode}: {name} failed: {failure}")
                    dropped[name] = str(failure)
                    print(f"{mode}: {name} is left out: {failure}", flush=True)
                    if name in sides:
                        sides.pop(name).close()
            check_equal_work(mode, facts)
            for number in range(given.rounds):
                measured: dict[str, float] = {}
                for name in list(sides)[:: -1 if number % 2 else 1]:
                    answer = sides[name].steps(given.steps_per_round)
                    measured[name] = sum(answer["seconds"]) / given.steps_per_round
                    peaks[name] = max(peaks[name], answer["peak_memory_bytes"])
                rounds.append(measured)
                shown = "  ".join(f"{name} {measured[name]:.3f}" for name in sides)
                print(f"{mode} round {number}, seconds a step: {shown}", flush=True)
        finally:
            for side in sides.values():
                side.close()
    return summarise(rounds, peaks, facts, dropped, given)


def check_equal_work(mode: str, facts: dict[str, dict[str, Any]]) -> None:
    """End the program where a side trains on other tokens, or its loss is another."""
    ours = facts["isotune"]
    for name, theirs in facts.items():
        if name in FLOORS:
            continue
        for count in ("input_tokens", "supervised_tokens"):
            if theirs[count] != ours[count]:
                sys.exit(f"{mode}: {name} has {theirs[count]} {count} a round and isotune {ours[count]}")
        if abs(theirs["loss"] / ours["loss"] - 1) > LOSS_TOLERANCE:
            sys.exit(
                f"{mode}: the loss of the same document is {theirs['loss']} for {name}, {ours['loss']} for isotune"
            )


def summarise(
    rounds: list[dict[str, float]],
    peaks: dict[str, int],
    facts: dict[str, dict[str, Any]],
    dropped: dict[str, str],
    given: argparse.Namespace,
) -> dict[str, Any]:
    """Medians over the rounds, and ratios within them."""
    seconds = {name: [r[name] for r in rounds if name in r] for name in facts}
    medians = {name: statistics.median(of_rounds) for name, of_rounds in seconds.items()}
    ratios = {
        name: statistics.median(r[name] / r["isotune"] for r in rounds if name in r)
        for name in facts
        if name in (*PEERS, DROP_IN)
    }
    best_peer = min((name for name in ratios if name != DROP_IN), key=lambda name: ratios[name], default=None)
    ours, floor = facts["isotune"], facts["floor_linear"]
    trained = [name for name in facts if name not in FLOORS]

    def rate(count: str) -> dict[str, float]:
        return {name: round(ours[count] / given.steps_per_round / medians[name], 1) for name in trained}

    flops_per_second = floor["model_flops"] / given.steps_per_round / medians["isotune"]
    peak = floor["peak_flops_per_second"]
    return {
        "device": floor["device"],
        "tokens_per_second": rate("input_tokens"),
        "supervised_tokens_per_second": rate("supervised_tokens"),
        "step_seconds": {
            name: {"median": round(medians[name], 5), "least": round(min(s), 5), "most": round(max(s), 5)}
            for name, s in seconds.items()
        },
        "peak_memory_bytes": {name: peaks[name] for name in trained},
        "ratio_drop_in": round(ratios[DROP_IN], 3) if DROP_IN in ratios else None,
        "ratio_stock": round(ratios["trl_stock"], 3) if "trl_stock" in ratios else None,
        "ratio_best": round(ratios[best_peer], 3) if best_peer else None,
        "best_peer": best_peer,
        "floor_share": round(statistics.median(r["floor"] / r["isotune"] for r in rounds), 3),
        "floor_linear_share": round(statistics.median(r["floor_linear"] / r["isotune"] for r in rounds), 3),
        "floor_flops_per_second": round(floor["product_flops"] / given.steps_per_round / medians["floor_linear"]),
        "model_flops_per_second": round(flops_per_second),
        "model_flops_utilisation": round(flops_per_second / peak, 4) if peak else None,
        "peak_flops_per_second": peak,
        "peak_source": floor["peak_source"],
        "first_loss": {name: round(facts[name]["loss"], 6) for name in trained},
        "dropped": dropped,
    }


def print_table(mode: str, found: dict[str, Any]) -> None:
    """What a person reads."""
    print(f"\n{mode}, {found['device']}")
    print(f"  {'side':<14}{'s a step':>10}{'least - most':>18}{'tokens/s':>10}{'supervised/s':>14}", end="")
    print(f"{'peak GB':>9}{'loss':>10}")
    for name, times in found["step_seconds"].items():
        spread = f"{times['least']:.3f} - {times['most']:.3f}"
        line = f"  {name:<14}{times['median']:>10.3f}{spread:>18}"
        if name not in FLOORS:
            line += f"{found['tokens_per_second'][name]:>10.0f}{found['supervised_tokens_per_second'][name]:>14.0f}"
            line += f"{found['peak_memory_bytes'][name] / 1e9:>9.2f}{found['first_loss'][name]:>10.4f}"
        print(line)
    print(f"  against stock {found['ratio_stock']}, against {found['best_peer']} {found['ratio_best']}", end="")
    if found["ratio_drop_in"] is not None:
        print(f", drop-in against isotune {found['ratio_drop_in']}", end="")
    print(f", floor share {found['floor_share']}", end="")
    print(f" (linear layers alone {found['floor_linear_share']})", end="")
    if found["model_flops_utilisation"] is not None:
        print(f", model FLOPs utilisation {found['model_flops_utilisation']:.1%} ({found['peak_source']})", end="")
    print("\n", flush=True)


if __name__ == "__main__":
    sys.exit(main())
