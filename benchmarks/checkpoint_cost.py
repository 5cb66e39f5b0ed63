"""What do starting, saving and resuming cost?

    python benchmarks/checkpoint_cost.py
    python benchmarks/checkpoint_cost.py --hidden_size 1024 --layers 24

Trains a random OPT of that size, full. The shipped script gives the seconds from the launch to the first step, with
prepared data, without and with a checkpoint to resume from. One process then measures, in turns, the seconds that a
step waits for its checkpoint, for the same checkpoint written synchronously, and for torch.save of the same tensors,
which is what stock Trainer does. `ratio` is the synchronous write divided by the stall.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

SCRIPT = Path(__file__).resolve().parents[1] / "train" / "sft_opt.py"


def main() -> None:
    """Both measurements, and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["ISOTUNE_CACHE"] = str(Path(scratch) / "cache")
        values = {
            "model_name_or_path": make_model(Path(scratch) / "model", given.hidden_size, given.layers),
            "dataset_name": "builtin:greetings",
            "max_seq_length": 128,
            "global_batch_size": 2,
            "tune": "full",
            "max_steps": 2,
            "save_steps": 1,
            "sample_prompt": "",
            "disable_tqdm": True,
            "output_dir": str(Path(scratch) / "run"),
        }
        launches = measure_launches(values)
        saves = measure_saves(values | {"output_dir": str(Path(scratch) / "saves"), "max_steps": 1}, given.rounds)
    for name, value in (launches | saves).items():
        print(f"{name:36} {value:,.3f}" if isinstance(value, float) else f"{name:36} {value:,}")
    ratio = saves["synchronous_seconds"] / saves["stall_seconds"]
    print(json.dumps({"benchmark": "checkpoint_cost", **launches, **saves, "ratio": ratio}))


def make_model(folder: Path, hidden_size: int, layers: int) -> str:
    """A random OPT, as a user's local model."""
    from transformers import OPTConfig, OPTForCausalLM

    from isotune.models.base.builtin import builtin_tokenizer

    tokenizer = builtin_tokenizer("builtin:opt-tiny")
    size: dict[str, Any] = {"hidden_size": hidden_size, "word_embed_proj_dim": hidden_size, "ffn_dim": 4 * hidden_size}
    OPTForCausalLM(
        OPTConfig(
            vocab_size=len(tokenizer),
            num_hidden_layers=layers,
            num_attention_heads=hidden_size // 64,
            max_position_embeddings=128,
            **size,
        )
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def measure_launches(values: dict[str, Any]) -> dict[str, float]:
    """Seconds from a launch to its first new step: prepared data, then going on from the first checkpoint."""
    run = Path(values["output_dir"])
    launch(values)  # prepares the data and warms the disk's cache
    shutil.rmtree(run)
    first = launch(values)
    shutil.rmtree(run / "model")
    shutil.rmtree(run / "checkpoints" / "step-00000002")
    return {"launch_to_first_step_seconds": first, "resume_to_first_step_seconds": launch(values)}


def launch(values: dict[str, Any]) -> float:
    """Run the script to its end; seconds until a line was added to metrics.jsonl."""
    metrics = Path(values["output_dir"]) / "metrics.jsonl"
    before = metrics.stat().st_mtime_ns if metrics.exists() else 0
    lines = 2 if any(metrics.parent.glob("checkpoints/step-*")) else 1
    recipe = Path(values["output_dir"]).with_suffix(".yaml")
    recipe.write_text(yaml.safe_dump(values))
    command = [sys.executable, str(SCRIPT), "--config", str(recipe)]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while process.poll() is None:
        if metrics.exists() and metrics.stat().st_mtime_ns > before and metrics.read_text().count("\n") >= lines:
            break
        time.sleep(0.005)
    seconds = time.perf_counter() - started
    output, _ = process.communicate()
    if process.returncode:
        sys.exit(output.decode())
    return seconds


def measure_saves(values: dict[str, Any], rounds: int) -> dict[str, Any]:
    """In turns: the stall of a checkpoint, the same while training waits, torch.save of the same tensors."""
    import torch

    from isotune.config import Recipe
    from isotune.data.sft.preparation import prepare_conversations
    from isotune.training.from_recipe import build_model, build_trainer, start_run

    recipe = Recipe.from_values(**values)
    start = start_run(recipe)
    data = prepare_conversations(recipe, start.tokenizer, show=start.process.is_main)
    model = build_model(start, data)
    trainer = build_trainer(start, model, data)
    checkpointer: Any = trainer.checkpointer
    trainer.train()
    seconds: dict[str, list[float]] = {"stall": [], "synchronous": [], "torch_save": []}
    optimizer: Any = trainer.optimizer
    for _ in range(rounds):
        started = time.perf_counter()
        checkpointer.save()
        seconds["stall"].append(time.perf_counter() - started)
        checkpointer.wait()
        started = time.perf_counter()
        checkpointer.save()
        checkpointer.wait()
        seconds["synchronous"].append(time.perf_counter() - started)
        started = time.perf_counter()
        with (start.run.path / "peer.pt").open("wb") as file:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
            os.fsync(file.fileno())
        seconds["torch_save"].append(time.perf_counter() - started)
    choice = checkpointer.store.newest_valid()
    assert choice.manifest is not None
    found: dict[str, Any] = {f"{name}_seconds": statistics.median(values) for name, values in seconds.items()}
    found |= {"bytes": sum(file.bytes for file in choice.manifest.files)}
    return found | {"parameters": sum(p.numel() for p in model.parameters())}


if __name__ == "__main__":
    main()
