"""The flags of what is measured on reviews, and the environment of such a benchmark."""

import argparse
import os
from pathlib import Path

DATA = Path(os.environ.get("ISOTUNE_TEST_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))


def parser_of_reviews(description: str | None) -> argparse.ArgumentParser:
    """A parser of the flags that `classification.measure` reads."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--documents", type=int, default=96, help="reviews a round")
    parser.add_argument("--geometry", choices=("minilm", "bert-base"), default="minilm")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32], help="of the pipeline")
    parser.add_argument("--data", type=Path, default=DATA, help="the folder of real data")
    return parser


def set_environment() -> None:
    """Before the libraries are imported: nothing of the Hub, and the tokenizer on all cores."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
