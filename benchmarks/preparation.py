"""How fast is preparation against `datasets.map` on all cores with the same tokenizer?

    python benchmarks/preparation.py
    python benchmarks/preparation.py --sizes 10000 100000 1000000      # rows/s by the number of rows, and memory

Both sides tokenise the same rows, cold, in interleaved rounds: real conversations (Guanaco's, repeated), and short
texts with a label, cut from WikiText. The peer only tokenises and truncates, the least that a stock script does, by
`map(batched=True, num_proc=cores)`. isotune also finds the answers, builds the mask and packs, or resolves the classes
and looks for duplicates; it counts, and writes its cache to disk. `ratio` is isotune's rows/s divided by the peer's, of
the median round.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

DATA = Path(os.environ.get("ISOTUNE_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
TOKENIZERS = {"conversations": "opt", "texts": "bert-base-uncased"}
LONGEST = {"conversations": 1_024, "texts": 128}
SHORT_WORDS = (8, 30)


def write_rows(kind: str, file: Path, count: int) -> None:
    """A file of `count` rows."""
    if kind == "conversations":
        lines = (DATA / "guanaco" / "train.jsonl").read_text("utf-8").splitlines()
        rows = [{"text": json.loads(line)["text"]} for line in lines]
        with file.open("w", encoding="utf-8") as out:
            out.writelines(json.dumps(rows[number % len(rows)]) + "\n" for number in range(count))
        return
    words, rng = (DATA / "text" / "wikitext2_valid.txt").read_text("utf-8").split(), random.Random(0)
    with file.open("w", encoding="utf-8") as out:
        for _ in range(count):
            first = rng.randrange(len(words) - SHORT_WORDS[1])
            text = " ".join(words[first : first + rng.randint(*SHORT_WORDS)])
            out.write(json.dumps({"text": text, "label": rng.randrange(3)}) + "\n")


def ours(kind: str, file: Path, scratch: str) -> int:
    """Prepare the file; returns the rows."""
    from transformers import AutoTokenizer

    from isotune.data.classification.labels import ClassificationSettings
    from isotune.data.classification.preparation import tokenize
    from isotune.data.sft.preparation import SftSettings, prepare
    from isotune.data.sources.source import read_rows

    os.environ["ISOTUNE_CACHE"] = tempfile.mkdtemp(dir=scratch)
    tokenizer = AutoTokenizer.from_pretrained(DATA / "tokenizers" / TOKENIZERS[kind])
    if kind == "conversations":
        settings = SftSettings(max_seq_length=LONGEST[kind])
        return prepare(str(file), "train", tokenizer, settings, show_progress=False).table.counts["read"]
    labelled = ClassificationSettings(max_seq_length=LONGEST[kind])
    return len(tokenize(read_rows(str(file)), tokenizer, labelled, show_progress=False).documents)


def peer(kind: str, file: Path, scratch: str) -> int:
    """Tokenise the file by `datasets.map` on all cores; returns the rows."""
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(DATA / "tokenizers" / TOKENIZERS[kind])
    # a fresh folder each time: neither the read file nor the mapped result may come from a cache
    cache = tempfile.mkdtemp(dir=scratch)
    read: Any = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=cache)
    made = read.map(
        lambda batch: tokenizer(batch["text"], truncation=True, max_length=LONGEST[kind]),
        batched=True,
        remove_columns=["text"],
        num_proc=os.cpu_count(),
        load_from_cache_file=False,
    )
    return len(made)


def compared(kind: str, rows: int, rounds: int, scratch: str) -> dict[str, Any]:
    """Rows/s of both sides on the same file, and the median ratio of the rounds."""
    file = Path(scratch) / f"{kind}.jsonl"
    write_rows(kind, file, rows)
    rates: dict[str, list[float]] = {"isotune": [], "datasets_map": []}
    sides: dict[str, Callable[[str, Path, str], int]] = {"isotune": ours, "datasets_map": peer}
    for round_number in range(rounds):
        for side, work in sides.items():
            started = time.perf_counter()
            assert work(kind, file, scratch) == rows
            rates[side].append(rows / (time.perf_counter() - started))
            print(f"{kind}, round {round_number}, {side}: {rates[side][-1]:,.0f} rows/s", flush=True)
    ratios = [own / other for own, other in zip(rates["isotune"], rates["datasets_map"], strict=True)]
    medians = {side: round(statistics.median(own)) for side, own in rates.items()}
    return {"rows": rows, "rows_per_second": medians, "ratio": round(statistics.median(ratios), 3)}


def by_size(kind: str, sizes: list[int], scratch: str) -> dict[str, dict[str, int]]:
    """Rows/s and peak memory of isotune by the number of rows, each in a process of its own."""
    found: dict[str, dict[str, int]] = {}
    for rows in sizes:
        file = Path(scratch) / f"{kind}-{rows}.jsonl"
        write_rows(kind, file, rows)
        command = [sys.executable, __file__, "--prepare", kind, str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[f"{rows}"] = json.loads(done.stdout.splitlines()[-1])
        print(f"{kind}, {rows:,} rows: {found[str(rows)]}", flush=True)
        file.unlink()
    return found


def prepare_alone(kind: str, file: Path) -> None:
    """Prepare one file and print rows/s and the peak of this process's memory."""
    with tempfile.TemporaryDirectory() as scratch:
        warm = Path(scratch) / "warm.jsonl"
        write_rows(kind, warm, 100)
        ours(kind, warm, scratch)  # imports the libraries
        started = time.perf_counter()
        rows = ours(kind, file, scratch)
        rate = round(rows / (time.perf_counter() - started))
    status = Path("/proc/self/status").read_text()  # getrusage would count what the parent had before
    peak = int(status.split("VmHWM:")[1].split()[0]) // 1_024
    print(json.dumps({"rows_per_second": rate, "peak_mib": peak}))


def main() -> None:
    """Run the rounds and print both rates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=4_000, help="rows of the comparison")
    parser.add_argument("--texts", type=int, default=100_000, help="rows of the comparison")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", type=int, nargs="*", default=[], help="rows of isotune alone")
    parser.add_argument("--prepare", nargs=2, metavar=("KIND", "FILE"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if not DATA.is_dir():
        parser.error(f"{DATA} is not there: set ISOTUNE_TEST_DATA")
    if given.prepare:
        prepare_alone(given.prepare[0], Path(given.prepare[1]))
        return

    import torch

    with tempfile.TemporaryDirectory() as scratch:
        result: dict[str, Any] = {"benchmark": "preparation", "cores": os.cpu_count()}
        result["instruction_set"] = torch.backends.cpu.get_cpu_capability()
        for kind in ("conversations", "texts"):
            result[kind] = compared(kind, getattr(given, kind), given.rounds, scratch)
        if given.sizes:
            result["texts_by_rows"] = by_size("texts", given.sizes, scratch)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
