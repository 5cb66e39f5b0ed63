"""train/imdb.py or train/yelp.py, started as a user starts it; after a stop it resumes from its own checkpoint."""

import json
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import yaml

from accuracy_sides.material import REPOSITORY, NotYet, recipe_values, write_predictions

PREEMPTED = 75


def run(data: str, folder: Path, given: Namespace) -> None:
    """Train and evaluate, or go on with it.

    Raises:
        NotYet: the time was over.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe_values(data, folder, given)), "utf-8")
    command = [sys.executable, str(REPOSITORY / "train" / f"{data}.py"), "--config", str(file)]
    with (folder / "log.txt").open("a") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            status = process.wait(given.stop_after_seconds or None)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            status = process.wait()
    if status == PREEMPTED or status == -signal.SIGTERM:
        raise NotYet
    if status:
        raise SystemExit(f"isotune on {data} ended with {status}: see {folder / 'log.txt'}")
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    last = sorted((folder / "run" / "eval").glob("step-*"))[-1]
    rows = [json.loads(line) for line in (last / "predictions.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    write_predictions(
        folder,
        [row["label"] for row in rows],
        [row["prediction"] for row in rows],
        steps=len(steps),
        seconds=sum(step["step_seconds"] for step in steps),
        input_tokens=sum(step["input_tokens"] for step in steps),
        final_loss=sum(step["loss"] for step in steps[-20:]) / 20,
    )
