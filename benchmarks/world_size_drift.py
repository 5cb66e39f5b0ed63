"""How far does the result of training depend on how it was run, with stock TRL, stock Trainer and isotune?

    python benchmarks/world_size_drift.py
    python benchmarks/world_size_drift.py --quick      # four updates, on 1 and 2 processes

A model of 60 thousand parameters is trained for some updates of six rows (or documents), fp32, AdamW, in every way in
which a user may spread six rows over processes and accumulation. Each side is compared with its own run on one process
with six microbatches of one row, so sides may differ in what they supervise. One thing is changed at a time: the
microbatch (2, 3 or 6 rows on one process; the worst counts), or the number of processes with microbatches of one row.

    trl_packed, trl_unpacked           SFTTrainer on a column `text`, with its defaults
    trainer_causal, trainer_classifier transformers.Trainer, padded batches by the task's collator
    isotune, isotune_exact             train/sft_opt.py, packed, by `accelerate launch`; exact_gradients false and true

All take the same weights, documents and optimizer settings, log every step and draw the order from one seed. The
columns: loss of the first update (with the same weights, a difference is another normalisation or a leak), loss of all
updates, the gradient norm as logged, the evaluation loss, the final weights (norm of the difference over the norm of
what training changed), and the updates that saw other documents (order). The peers cannot run a global batch of six on
four or five processes: their update is processes x batch x accumulation. isotune also runs on four, and under ZeRO-2 on
two.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).resolve().parents[1]
PEERS = ("trl_packed", "trl_unpacked", "trainer_causal", "trainer_classifier")
OURS = {"isotune": False, "isotune_exact": True}
BASE = "1 process"
LAUNCH_SECONDS = 900


@dataclass(frozen=True)
class Layout:
    """One way to run six rows: microbatches of `batch` rows on `processes`, the rest by accumulation."""

    processes: int
    batch: int
    engine: str = "ddp"

    @property
    def change(self) -> str:
        """What was changed from the base, as the tables say it."""
        if self.engine != "ddp":
            return f"ZeRO-2 on {self.processes}"
        if self.processes > 1:
            return f"{self.processes} processes"
        return BASE if self.batch == 1 else "bigger microbatch"


LAYOUTS = (
    *(Layout(1, batch) for batch in (1, 2, 3, 6)),
    Layout(2, 1),
    Layout(3, 1),
    Layout(2, 1, "zero2"),
    Layout(4, 1),
)
QUICK = (Layout(1, 1), Layout(1, 3), Layout(2, 1))


def main() -> None:
    """Launch everything, compare, print the tables and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="updates; an epoch has about 8 to 16")
    parser.add_argument("--quick", action="store_true", help="four updates, on 1 and 2 processes")
    given = parser.parse_args()
    steps, layouts = (4, QUICK) if given.quick else (given.steps, LAYOUTS)
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ["PYTHONPATH"] = str(REPOSITORY / "benchmarks")  # nothing of the caller's, and the peers' own package
    os.environ["DS_ACCELERATOR"] = "cpu"  # every side runs there, also where there is a GPU
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        os.environ |= {"ISOTUNE_CACHE": str(place / "cache"), "HF_DATASETS_CACHE": str(place / "datasets")}
        from drift_sides.material import write_material

        (place / "material").mkdir()
        write_material(place / "material")
        for processes, engine in dict.fromkeys((one.processes, one.engine) for one in layouts):
            together = [one for one in layouts if (one.processes, one.engine) == (processes, engine)]
            run_isotune(together, steps, place)
            if engine == "ddp" and 6 % processes == 0:
                run_peers(together, steps, place)
            print(f"{time.perf_counter() - started:4.0f} s: {engine if processes > 1 else 'plain'} on {processes}")
        found = compare_all(layouts, place)
    print_tables(found)
    result = {"benchmark": "world_size_drift", "steps": steps, "seconds": round(time.perf_counter() - started)}
    rows = [{"side": key[0], "dropout": key[1], "change": key[2], **asdict(value)} for key, value in found.items()]
    print(json.dumps(result | {"drift": rows}))


def run_peers(layouts: list[Layout], steps: int, place: Path) -> None:
    """Every stock run of these layouts, which share processes and engine, in one launch."""
    from drift_sides.material import DROPOUTS, GLOBAL_BATCH

    first = layouts[0]
    runs = [
        {
            "side": side,
            "dropout": dropout,
            "batch": one.batch,
            "accumulation": GLOBAL_BATCH // one.batch // one.processes,
            "steps": steps,
            "folder": str(folder_of(place, side, dropout, one)),
        }
        for one in layouts
        for side in PEERS
        for dropout in DROPOUTS
    ]
    file = place / "runs.json"
    file.write_text(json.dumps(runs))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(first.processes)]
    module = ["-m", "drift_sides.peers"]
    start = [*torchrun, *module] if first.processes > 1 else module
    launch([*start, str(place / "material"), str(file)])


def run_isotune(layouts: list[Layout], steps: int, place: Path) -> None:
    """Every run of ours of these layouts in one launch, by the shipped script and configuration."""
    from drift_sides.material import DROPOUTS, GLOBAL_BATCH, OPTIMIZER, ROW_TOKENS, TOKENIZER

    files = []
    for one in layouts:
        for side, exact in OURS.items():
            for dropout in DROPOUTS:
                folder = folder_of(place, side, dropout, one)
                folder.mkdir(parents=True)
                recipe: dict[str, Any] = {
                    "model_name_or_path": str(place / "material" / f"causal-dropout_{dropout}"),
                    "tokenizer_name_or_path": TOKENIZER,
                    "tune": "full",
                    "dataset_name": str(place / "material" / "train.jsonl"),
                    "eval_dataset_name": str(place / "material" / "test.jsonl"),
                    "max_seq_length": ROW_TOKENS,
                    "microbatch_tokens": one.batch * ROW_TOKENS,
                    "global_batch_size": GLOBAL_BATCH,
                    "max_steps": steps,
                    "exact_gradients": exact,
                    "save_strategy": "no",
                    "sample_prompt": "",
                    "disable_tqdm": True,
                    "output_dir": str(folder / "run"),
                    **OPTIMIZER,
                }
                files.append(folder / "recipe.yaml")
                files[-1].write_text(yaml.safe_dump(recipe))
    first = layouts[0]
    accelerate = ["-m", "accelerate.commands.launch", "--config_file", f"accelerate_configs/{first.engine}.yaml"]
    accelerate += ["--num_processes", str(first.processes), "--main_process_port", "0"]
    several = ["tests/distributed/one_after_the_other.py", "train/sft_opt.py", "0", *map(str, files)]
    launch([*(accelerate if first.processes > 1 else []), *several])


def launch(arguments: list[str]) -> None:
    """Run python with these; end the program with what it said where it fails."""
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=LAUNCH_SECONDS, check=False)
    if done.returncode:
        sys.exit(f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}\n{' '.join(command[:8])} ended with {done.returncode}")


def folder_of(place: Path, side: str, dropout: str, one: Layout) -> Path:
    """Where a run lies."""
    return place / f"{side}-dropout_{dropout}-{one.engine}-{one.processes}x{one.batch}"


def compare_all(layouts: tuple[Layout, ...], place: Path) -> dict[tuple[str, str, str], Any]:
    """The drift by side, dropout and change; where several layouts are one change, the worst of each figure."""
    from drift_sides.compare import drift, load_model, read_isotune, read_peer
    from drift_sides.material import DROPOUTS

    found: dict[tuple[str, str, str], Any] = {}
    for side in (*PEERS, *OURS):
        task = "classifier" if side == "trainer_classifier" else "causal"
        for dropout in DROPOUTS:
            initial = load_model(place / "material" / f"{task}-dropout_{dropout}")
            base = None
            for one in layouts:
                folder = folder_of(place, side, dropout, one)
                if not folder.exists():  # a peer's batch does not divide so
                    continue
                ran = read_isotune(folder / "run") if side in OURS else read_peer(folder)
                if base is None:
                    base = ran
                    continue
                key = (side, dropout, one.change)
                apart = drift(base, ran, initial)
                found[key] = found[key].worse(apart) if key in found else apart
    return found


def print_tables(found: dict[tuple[str, str, str], Any]) -> None:
    """What a person reads: a table for dropout off and one for dropout on."""
    by_dropout: dict[str, list[tuple[str, str, Any]]] = defaultdict(list)
    for (side, dropout, change), value in found.items():
        by_dropout[dropout].append((side, change, value))
    for dropout, rows in by_dropout.items():
        print(f"\ndropout {dropout}: largest relative difference to the same side on 1 process, 6 x 1 row")
        print(f"  {'side':<20}{'changed':<20}{'first loss':>11}{'loss':>10}{'grad norm':>11}{'eval loss':>11}", end="")
        print(f"{'weights':>10}{'max abs':>10}{'other documents':>17}")
        for side, change, value in rows:
            print(f"  {side:<20}{change:<20}{value.first_loss:>11.1e}{value.loss:>10.1e}", end="")
            print(f"{value.grad_norm:>11.1e}{value.eval_loss:>11.1e}{value.weights:>10.1e}", end="")
            print(f"{value.weights_max_abs:>10.1e}{value.other_work_steps:>10} updates")
    print()


if __name__ == "__main__":
    main()
