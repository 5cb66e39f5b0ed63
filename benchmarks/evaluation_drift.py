"""How far does the evaluation loss move with the batch size and the number of processes alone?

    python benchmarks/evaluation_drift.py

One random classifier and 41 generated opinions (neither batches of 7 or 64 nor 2 or 3 processes divide them), evaluated
by stock Trainer and by isotune in batches of 1, 7 and 64 on 1, 2 and 3 real processes, in fp32. The mean loss of each
is printed; `drift` is the largest difference over the smallest loss. Target: below 1e-6 for isotune.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROWS, MAX_TOKENS = 41, 64
BATCH_SIZES, PROCESSES = (1, 7, 64), (1, 2, 3)
REPOSITORY = Path(__file__).resolve().parents[1]
TO_REACH = 1e-6


def main() -> None:
    """Make the model, start every launch, print a table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child is not None:
        evaluate(given.child)
        return
    losses: dict[str, dict[str, float]] = {"trainer": {}, "isotune": {}}
    with tempfile.TemporaryDirectory() as scratch:
        make_model(Path(scratch))
        for processes in PROCESSES:
            start(Path(scratch), processes)
            for side, by_batch in json.loads((Path(scratch) / "losses.json").read_text()).items():
                losses[side] |= {f"{processes} x {batch}": loss for batch, loss in by_batch.items()}
    drift = {side: (max(found.values()) - min(found.values())) / min(found.values()) for side, found in losses.items()}
    print(f"{'processes x batch':<18} {'trainer':>12} {'isotune':>12}")
    for way, loss in losses["trainer"].items():
        print(f"{way:<18} {loss:>12.7f} {losses['isotune'][way]:>12.7f}")
    print(json.dumps({"benchmark": "evaluation_drift", "rows": ROWS, "drift": drift, "losses": losses,
                      "reached": drift["isotune"] < TO_REACH}))  # fmt: skip


def make_model(folder: Path) -> None:
    """A small classifier whose losses differ from text to text, and the rows."""
    import torch
    from transformers import AutoModelForSequenceClassification

    from isotune.data.sources.source import find_corpus
    from isotune.models.base.builtin import builtin_config, builtin_tokenizer

    torch.manual_seed(0)
    config = builtin_config("builtin:bert-tiny")
    config.num_labels = 3
    model = AutoModelForSequenceClassification.from_config(config)
    for name, parameter in model.named_parameters():
        if "classifier" in name or "pooler" in name:
            parameter.data.normal_(std=0.6)
    model.save_pretrained(folder / "model")
    builtin_tokenizer("builtin:bert-tiny").save_pretrained(folder / "model")
    rows = list(find_corpus("builtin:opinions").rows("test"))[:ROWS]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def start(folder: Path, processes: int) -> None:
    """Both sides in every batch size, in the processes of one launch."""
    config = str(REPOSITORY / "accelerate_configs" / ("ddp.yaml" if processes > 1 else "single.yaml"))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config]
    launch += ["--num_processes", str(processes), "--main_process_port", "0"]
    subprocess.run(
        [*launch, __file__, "--child", str(folder)], check=True, env={**os.environ, "ISOTUNE_CACHE": str(folder)}
    )


def evaluate(folder: Path) -> None:
    """One process of a launch: the mean losses of both sides by batch size, written by the main process."""
    from scipy.special import softmax

    from isotune.evaluation.classification.evaluate import classify, read_task_rows
    from isotune.evaluation.distributed_eval import start_ranks
    from isotune.evaluation.metrics.classification import classification_statistics
    from isotune.evaluation.models import load_model_classifier
    from isotune.evaluation.statistics.resampling import values
    from isotune.evaluation.tasks import ClassificationTask

    ranks = start_ranks()
    losses: dict[str, dict[int, float]] = {"trainer": {}, "isotune": {}}
    import torch

    classifier = load_model_classifier(str(folder / "model"), ranks.device, torch.float32)
    task = ClassificationTask(dataset_name=str(folder / "rows.jsonl"), max_seq_length=MAX_TOKENS)
    rows = read_task_rows(task, classifier, ranks)
    for batch_size in BATCH_SIZES:
        logits = classify(classifier, rows.documents, ranks, batch_size=batch_size)
        found = values(classification_statistics(rows.labels, softmax(logits, axis=1)))
        losses["isotune"][batch_size] = found["log_loss"]
        losses["trainer"][batch_size] = by_trainer(folder, batch_size)
    if ranks.is_main:
        (folder / "losses.json").write_text(json.dumps(losses))


def by_trainer(folder: Path, batch_size: int) -> float:
    """`eval_loss` of stock Trainer."""
    from datasets import Dataset
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
    )

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    rows: Any = Dataset.from_json(str(folder / "rows.jsonl"))
    encoded = rows.map(lambda row: tokenizer(row["text"], truncation=True, max_length=MAX_TOKENS))
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        per_device_eval_batch_size=batch_size,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        accelerator_config={"use_configured_state": True},
    )
    model = AutoModelForSequenceClassification.from_pretrained(folder / "model")
    collator = DataCollatorWithPadding(tokenizer)
    trainer = Trainer(model, arguments, data_collator=collator, eval_dataset=encoded.remove_columns(["text"]))
    return float(trainer.evaluate()["eval_loss"])


if __name__ == "__main__":
    main()
