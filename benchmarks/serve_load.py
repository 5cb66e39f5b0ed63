"""Do 64 clients at once get every answer, the same as one by one, and how much sooner?

    python benchmarks/serve_load.py

Starts `isotune serve` on loopback for a classifier of DistilBERT's geometry and a language model of OPT's with random
weights, or for a run of your own (`--run`). First one client asks every question, one after the other; then all clients
ask theirs at once. An answer is the same where no probability differs by more than 1e-6, or where its text is equal.
"""

import argparse
import asyncio
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import torch
import yaml
from transformers import DistilBertConfig, DistilBertForSequenceClassification, OPTConfig, OPTForCausalLM

from isotune.data.sources.source import read_rows
from isotune.models.base.builtin import builtin_tokenizer

TOLERANCE = 1e-6  # of a probability
CLASSIFIER, GENERATOR = "classifier", "generator"


def make_run(kind: str, folder: Path, layers: int) -> Path:
    """A run folder whose model has the weights that it is made with."""
    torch.manual_seed(0)
    if kind == CLASSIFIER:
        tokenizer, keys = builtin_tokenizer("builtin:bert-tiny"), {"task": "classification", "max_seq_length": 256}
        labels: dict[str, Any] = {"num_labels": 3}
        config: Any = DistilBertConfig(vocab_size=len(tokenizer), n_layers=layers, pad_token_id=1, **labels)
        model: Any = DistilBertForSequenceClassification(config)
    else:
        tokenizer, keys = builtin_tokenizer("builtin:opt-tiny"), {"task": "sft"}
        size: dict[str, Any] = {
            "hidden_size": 512,
            "word_embed_proj_dim": 512,
            "ffn_dim": 2048,
            "num_attention_heads": 8,
        }
        config = OPTConfig(vocab_size=len(tokenizer), num_hidden_layers=layers, init_std=0.2, **size)
        model = OPTForCausalLM(config)
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(keys), encoding="utf-8")
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder


@contextlib.contextmanager
def served(run: Path) -> Iterator[str]:
    """The address of a server of the run."""
    command = [sys.executable, "-m", "isotune.cli", "serve", str(run), "--port", "0", "--no_replay", "--timeout", "600"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if line.startswith("serving "):
                yield next(word for word in line.split() if word.startswith("http://"))
                process.terminate()
                assert process.wait(60) == 0
                return
        raise SystemExit(f"the server of {run} did not begin")
    finally:
        process.kill()


def requests_of(kind: str, count: int, new_tokens: int) -> tuple[str, list[dict[str, Any]]]:
    """A path, and bodies for it."""
    if kind == CLASSIFIER:
        texts = [row["text"] for row in read_rows("builtin:opinions", "train").rows()]
        return "/predict", [{"text": texts[number % len(texts)]} for number in range(count)]
    question = "What is the capital of country number {}?"
    greedy = {"max_tokens": new_tokens, "temperature": 0}
    messages = [[{"role": "user", "content": question.format(number)}] for number in range(count)]
    return "/v1/chat/completions", [{"messages": one, **greedy} for one in messages]


async def ask_all(url: str, path: str, bodies: list[dict[str, Any]], clients: int) -> dict[str, Any]:
    """Each client asks its share of the questions, one after the other, all clients at once."""
    seconds, answers, errors = [0.0] * len(bodies), [None] * len(bodies), 0

    async def one_client(first: int) -> None:
        nonlocal errors
        for number in range(first, len(bodies), clients):
            started = time.perf_counter()
            answer = await session.post(path, json=bodies[number])
            seconds[number] = time.perf_counter() - started
            errors += answer.status_code != 200
            answers[number] = answer.json()

    # one connection a client; what each would set up of TLS by itself takes longer than a small model
    connections = httpx2.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx2.AsyncClient(base_url=url, timeout=600, limits=connections, verify=False) as session:
        started = time.perf_counter()
        await asyncio.gather(*(one_client(number) for number in range(clients)))
        elapsed = time.perf_counter() - started
    p50, p99 = np.quantile(seconds, [0.5, 0.99])
    figures = {"requests_per_second": round(len(bodies) / elapsed, 2), "p50_seconds": round(float(p50), 4)}
    return figures | {"p99_seconds": round(float(p99), 4), "errors": errors, "answers": answers}


def batches_of(url: str) -> int:
    """The number of batches that a server has run, once it rests."""
    while (counts := httpx2.get(f"{url}/health").json()["requests"])["running"] or counts["waiting"]:
        time.sleep(0.01)
    return counts["batches"]


def is_same(kind: str, one: Any, other: Any) -> bool:
    """Whether two answers are the same."""
    if kind == GENERATOR:
        return one["choices"][0]["message"]["content"] == other["choices"][0]["message"]["content"]
    pairs = zip(one["predictions"], other["predictions"], strict=True)
    return all(
        max(abs(p["probabilities"][name] - q["probabilities"][name]) for name in p["probabilities"]) <= TOLERANCE
        for p, q in pairs
    )


def measure(kind: str, run: Path, given: argparse.Namespace) -> dict[str, Any]:
    """The figures of one kind of model."""
    path, bodies = requests_of(kind, given.clients * given.requests, given.new_tokens)
    with served(run) as url:
        asyncio.run(ask_all(url, path, bodies[:8], 1))  # what is set up at the first request
        before = batches_of(url)
        alone = asyncio.run(ask_all(url, path, bodies, 1))
        between = batches_of(url)
        together = asyncio.run(ask_all(url, path, bodies, given.clients))
        after = batches_of(url)
    assert between - before == len(bodies)
    pairs = list(zip(alone.pop("answers"), together.pop("answers"), strict=True))
    same = sum(is_same(kind, one, other) for one, other in pairs)
    faster = together["requests_per_second"] / alone["requests_per_second"]
    result = {"one_by_one": alone, "together": together, "faster": round(faster, 2)}
    result |= {"requests": len(bodies), "same_answers": same, "batches": after - between}
    print(f"{kind}: {result}", flush=True)
    return result


def main() -> None:
    """Measure both kinds, or one run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=[CLASSIFIER, GENERATOR], choices=[CLASSIFIER, GENERATOR])
    parser.add_argument("--run", type=Path, help="a finished run of the one kind that is named")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=4, help="of each client")
    parser.add_argument("--layers", type=int, default=6, help="of the models that are made")
    parser.add_argument("--new_tokens", type=int, default=32, help="of an answer at most")
    given = parser.parse_args()
    if given.run is not None and len(given.kinds) > 1:
        parser.error("--run is of one kind: name it by --kinds")
    results: dict[str, Any] = {"benchmark": "serve_load", "clients": given.clients}
    with tempfile.TemporaryDirectory() as folder:
        for kind in given.kinds:
            run = given.run or make_run(kind, Path(folder, kind), given.layers)
            results[kind] = measure(kind, run, given)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
