"""How fast is preparation against `datasets.map(batched=True)` with the same tokenizer?

    python benchmarks/preparation.py

Both sides tokenise the same real conversations (Guanaco's, repeated), cold, in interleaved rounds. The peer only
tokenises and truncates, the least that a stock script does. isotune also finds the answers, builds the mask, packs, and
writes its cache to disk. `ratio` is isotune's tokens/s divided by the peer's, of the median round.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

DATA = Path(os.environ.get("ISOTUNE_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


def main() -> None:
    """Run the rounds and print both rates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=Path, default=DATA / "guanaco" / "train.jsonl")
    parser.add_argument("--tokenizer", type=Path, default=DATA / "tokenizers" / "opt")
    parser.add_argument("--repeat", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--max_seq_length", type=int, default=1_024)
    given = parser.parse_args()
    for needed in (given.conversations, given.tokenizer):
        if not needed.exists():
            parser.error(f"{needed} is not there: set ISOTUNE_TEST_DATA or name another")

    import datasets
    import numpy as np
    from transformers import AutoTokenizer

    from isotune.data.sft.preparation import SftSettings, prepare

    datasets.disable_progress_bars()
    lines = given.conversations.read_text("utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines] * given.repeat
    peer_tokenizer = AutoTokenizer.from_pretrained(given.tokenizer)
    our_tokenizer = AutoTokenizer.from_pretrained(given.tokenizer)
    settings = SftSettings(max_seq_length=given.max_seq_length)

    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "train.jsonl"
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")

        def ours() -> np.ndarray:
            os.environ["ISOTUNE_CACHE"] = tempfile.mkdtemp(dir=scratch)
            return prepare(str(source), "train", our_tokenizer, settings, show_progress=False).documents.lengths

        def peer() -> datasets.Dataset:
            # A fresh folder each time: neither the read file nor the mapped result may come from a cache.
            cache = tempfile.mkdtemp(dir=scratch)
            read = datasets.load_dataset("json", data_files=str(source), split="train", cache_dir=cache)
            return read.map(
                lambda batch: peer_tokenizer(batch["text"], truncation=True, max_length=given.max_seq_length),
                batched=True,
                remove_columns=["text"],
                load_from_cache_file=False,
            )

        rates: dict[str, list[float]] = {"isotune": [], "datasets_map": []}
        for round_number in range(given.rounds):
            for side, work in (("isotune", ours), ("datasets_map", peer)):
                started = time.perf_counter()
                made = work()
                seconds = time.perf_counter() - started
                tokens = int(made.sum()) if isinstance(made, np.ndarray) else sum(map(len, made["input_ids"]))
                rates[side].append(tokens / seconds)
                print(f"round {round_number} {side}: {tokens:,} tokens in {seconds:.2f} s")

    medians = {side: statistics.median(of_rounds) for side, of_rounds in rates.items()}
    ratios = [ours / peers for ours, peers in zip(rates["isotune"], rates["datasets_map"], strict=True)]
    result = {
        "benchmark": "preparation",
        "conversations": len(texts),
        "cores": os.cpu_count(),
        "tokens_per_second": {side: round(rate) for side, rate in medians.items()},
        "ratio": round(statistics.median(ratios), 3),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
