"""`make demo` is a claim about learning: what it ends with, before and after LoRA, is held here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.launching import REPOSITORY


def run(*command: str) -> None:
    surroundings = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *command], cwd=REPOSITORY, env=surroundings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def exact_match(folder: Path) -> float:
    """Counted from the answers themselves, not from the score that was written beside them."""
    answers = [json.loads(line) for line in (folder / "eval" / "pirate" / "predictions.jsonl").read_text().splitlines()]
    assert len(answers) == 32
    return sum(a["text"].strip() == a["reference"].strip() for a in answers) / len(answers)


@pytest.mark.slow
def test_lora_takes_the_demo_from_at_most_5_to_at_least_80_percent_on_held_out_questions(tmp_path):
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    ask = ("--dataset_name", "builtin:pirate", "--max_new_tokens", "32")
    run("train/sft_opt.py", "--config", "train/configs/demo_base.yaml", "--output_dir", str(base))
    run("eval/generate.py", "--run_dir", str(base), *ask)
    lora = ("--model_name_or_path", str(base / "model"), "--output_dir", str(tuned))
    run("train/sft_opt.py", "--config", "train/configs/demo.yaml", *lora)
    run("eval/generate.py", "--run_dir", str(tuned), *ask)
    assert exact_match(base) <= 0.05
    assert exact_match(tuned) >= 0.80
