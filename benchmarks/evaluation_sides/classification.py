"""Documents a second from texts to probabilities: eval/classify.py's way beside transformers' pipeline.

The same random model in fp32, the same real reviews cut to 512 tokens, the same threads, turn by turn in one process.
The pipeline is given the sizes of batch below, and its best one counts. Both sides tokenise within the measured time.
Every round has reviews of its own, as an evaluation reads each once, after one that is not counted.

`products_alone` is the floor: the time that the linear layers' products of these passes take by themselves, with both
sides' implementations of them, beside the time of the side that uses it.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import softmax
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, pipeline

from isotune.data.classification.labels import ClassificationSettings
from isotune.data.classification.preparation import tokenize
from isotune.data.sources.source import read_rows
from isotune.evaluation.classification.evaluate import BATCH_TOKENS, classify
from isotune.evaluation.distributed_eval import Ranks
from isotune.evaluation.models import Classifier
from isotune.models.classifier import install_classification
from isotune.models.cpu.functional import onednn_products

GEOMETRIES = {
    "minilm": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    "bert-base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
}
MAX_TOKENS, TO_REACH = 512, 1.5
WARM_UP = 4  # reviews that are not counted
TOLERANCE = 1e-5


Side = Callable[[Classifier, list[dict[str, Any]]], np.ndarray]  # probabilities of rows, [rows, classes]


def measure(given: Namespace, by_isotune: Side | None = None) -> dict[str, Any]:
    """Rounds of both sides over the same documents; the ratio is the median over rounds.

    `by_isotune` is by default the way of an evaluation.
    """
    by_isotune = by_isotune or by_evaluation
    tokenizer = AutoTokenizer.from_pretrained(given.data / "tokenizers" / "bert-base-uncased")
    geometry: dict[str, Any] = GEOMETRIES[given.geometry]
    config = BertConfig(vocab_size=len(tokenizer), **geometry)
    torch.manual_seed(0)
    stock, ours = (BertForSequenceClassification(config).eval() for _ in range(2))
    ours.load_state_dict(stock.state_dict())
    install_classification(ours)
    settings = ClassificationSettings(MAX_TOKENS, num_labels=2)
    classifier = Classifier("random", ours, tokenizer, settings, None)
    pipe: Any = pipeline("text-classification", model=stock, tokenizer=tokenizer, top_k=None, device="cpu")
    lines = (given.data / "imdb" / "test.jsonl").read_text("utf-8").rstrip("\n").split("\n")
    if WARM_UP + given.rounds * given.documents > len(lines):
        sys.exit(f"{len(lines)} reviews are not enough for {given.rounds} rounds of {given.documents}: ask for fewer")
    order = iter(np.random.default_rng(0).permutation(len(lines)).tolist())
    warm = [json.loads(lines[next(order)]) for _ in range(WARM_UP)]
    by_isotune(classifier, warm)
    _by_pipeline(pipe, warm, 1)
    rates: dict[str, list[float]] = {}
    cpu: dict[str, list[float]] = {}  # seconds of all threads, which other work on the machine changes little
    apart, floors = 0.0, []
    for number in range(given.rounds):
        rows = [json.loads(lines[next(order)]) for _ in range(given.documents)]
        sides = ["isotune", *(f"pipeline {size}" for size in given.batch_sizes)]
        found: dict[str, np.ndarray] = {}
        for side in sides if number % 2 == 0 else sides[::-1]:
            started, spent = time.perf_counter(), time.process_time()
            if side == "isotune":
                found[side] = by_isotune(classifier, rows)
            else:
                found[side] = _by_pipeline(pipe, rows, int(side.split()[1]))
            rates.setdefault(side, []).append(len(rows) / (time.perf_counter() - started))
            cpu.setdefault(side, []).append(time.process_time() - spent)
            print(f"round {number}: {side:<12} {rates[side][-1]:.1f} documents/s", flush=True)
        apart = max(apart, *(float(np.abs(one - found["isotune"]).max()) for one in found.values()))
        assert apart < TOLERANCE, f"the sides differ by {apart}"
        floors.append(_products_alone(classifier, rows))
    middle = {side: statistics.median(of_rounds) for side, of_rounds in rates.items()}
    best = max((side for side in middle if side != "isotune"), key=lambda side: middle[side])
    ratio = statistics.median(a / b for a, b in zip(rates["isotune"], rates[best], strict=True))
    cpu_of_best = (cpu["isotune"], cpu[min(cpu.keys() - {"isotune"}, key=lambda side: statistics.median(cpu[side]))])
    ours_alone, torchs_alone = (statistics.median(seconds) / given.documents for seconds in zip(*floors, strict=True))
    return {
        "geometry": given.geometry,
        "documents": given.documents,
        "threads": torch.get_num_threads(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "documents_per_second": {side: round(rate, 2) for side, rate in middle.items()},
        "pipeline_best": best,
        "largest_difference": apart,
        "products_alone": {
            "isotune_share": round(ours_alone * middle["isotune"], 3),
            "pipeline_share": round(torchs_alone * middle[best], 3),
        },
        "ratio": round(ratio, 3),
        "ratio_of_cpu_seconds": round(statistics.median(b / a for a, b in zip(*cpu_of_best, strict=True)), 3),
        "reached": ratio >= TO_REACH,
    }


def _products_alone(classifier: Classifier, rows: list[dict[str, Any]]) -> tuple[float, float]:
    """Seconds of every linear layer's product over these reviews' tokens: by oneDNN in one pass of 4,096 tokens after
    another, with the last block's at first tokens alone; and by torch's own `linear`, a review at a time, all tokens.
    """
    lengths = [
        len(classifier.tokenizer(row["text"], truncation=True, max_length=MAX_TOKENS)["input_ids"]) for row in rows
    ]
    blocks = classifier.model.bert.encoder.layer
    layers = [[m for m in block.modules() if isinstance(m, torch.nn.Linear)] for block in blocks]
    keys_and_values = [blocks[-1].attention.self.key, blocks[-1].attention.self.value]
    passes = [BATCH_TOKENS["cpu"]] * (sum(lengths) // BATCH_TOKENS["cpu"]) + [sum(lengths) % BATCH_TOKENS["cpu"]]
    with torch.inference_mode():
        with onednn_products():
            ours = _timed([*layers[:-1], keys_and_values], passes)
        return ours, _timed(layers, lengths)


def _timed(layers: list[list[torch.nn.Linear]], passes: list[int]) -> float:
    inputs = {(n, m.in_features): torch.randn(n, m.in_features) for n in set(passes) for of in layers for m in of}
    started = time.perf_counter()
    for tokens in passes:
        for layer in (layer for of_block in layers for layer in of_block):
            torch.nn.functional.linear(inputs[tokens, layer.in_features], layer.weight, layer.bias)
    return time.perf_counter() - started


def by_evaluation(classifier: Classifier, rows: list[dict[str, Any]]) -> np.ndarray:
    """From a file of rows to probabilities, as an evaluation prepares and classifies them."""
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["ISOTUNE_CACHE"] = scratch  # what was prepared in another round is not taken from there
        file = Path(scratch) / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        source = read_rows(str(file), "test")
        documents = tokenize(source, classifier.tokenizer, classifier.settings, show_progress=False).documents
        return softmax(classify(classifier, documents, Ranks(0, 1, torch.device("cpu"))), axis=1)


def _by_pipeline(pipe: Any, rows: list[dict[str, Any]], batch_size: int) -> np.ndarray:
    said = pipe([row["text"] for row in rows], batch_size=batch_size, truncation=True, max_length=MAX_TOKENS)
    return np.array([[one["score"] for one in sorted(row, key=lambda one: one["label"])] for row in said])
