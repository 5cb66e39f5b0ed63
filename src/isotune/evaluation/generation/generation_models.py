"""Opens the model of a finished run, or any causal model, and answers a question with the prompt of training."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from isotune.data.sft.conversations import render_prompt
from isotune.evaluation.generation.batched_generation import GenerationModel, Prompt, complete
from isotune.evaluation.generation.decoding import Decoding, first_turn
from isotune.evaluation.generation.zero3 import Shards
from isotune.evaluation.named_model import check_named_model
from isotune.models.finished_run import load_run_model, load_run_tokenizer, read_run
from isotune.models.opening import load_pretrained, load_pretrained_config, load_pretrained_tokenizer

Messages = Sequence[Mapping[str, str]]


def generation_model_of_run(
    run_dir: str | Path, device: torch.device | None = None, shards: Shards | None = None
) -> GenerationModel:
    """A finished run's model, full or an adapter on its base, with its tokenizer.

    Args:
        run_dir: RUN.
        device: by default a GPU where there is one.
        shards: shard it over all ranks with ZeRO-3. A 4-bit base is whole on each of them all the same.

    Raises:
        UserError: no finished run, or its model cannot be loaded.
    """
    run = read_run(run_dir)
    shards = None if run.settings.get("tune") == "qlora" else shards
    stored = run.training_dtype if run.is_adapter and not run.base_made_here else _stored_dtype(run.base or run.model)
    announced = shards.announce(stored) if shards else None
    model = load_run_model(run, device or best_device())
    del announced
    # peft's layers stay inside the model that they adapt
    lm = GenerationModel(model.get_base_model() if run.is_adapter else model, load_run_tokenizer(run))
    return shards.spread(lm) if shards else lm


def generation_model_named(
    name: str, device: torch.device | None = None, shards: Shards | None = None
) -> GenerationModel:
    """Any causal model with weights in safetensors: a folder or a Hub id.

    Raises:
        UserError: it cannot be loaded, or is an adapter.
    """
    from transformers import AutoModelForCausalLM

    check_named_model(name)
    announced = shards.announce(_stored_dtype(name)) if shards else None
    model = load_pretrained(name, auto=AutoModelForCausalLM, dtype="auto").to(device or best_device()).eval()
    del announced
    lm = GenerationModel(model, load_pretrained_tokenizer(name))
    return shards.spread(lm) if shards else lm


def _stored_dtype(name: str | Path) -> torch.dtype:
    """The dtype of a model weights, from its configuration."""
    stored: Any = load_pretrained_config(str(name)).dtype
    return stored or torch.float32


def best_device() -> torch.device:
    """A CUDA device where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def answer(lm: GenerationModel, question: str | Messages, decoding: Decoding | None = None) -> str:
    """The model's answer to a question, or to the last of several messages.

    The prompt is the one of training, the tokenizer adds its bos, and the answer ends at eos or where the model begins
    another turn. It depends on the model, the messages and `decoding` alone; torch's random state does not change.

    Args:
        lm: what `generation_model_of_run` returned.
        question: a text, or messages with `role` and `content`, a user's last.
        decoding: greedy by default.

    Raises:
        UserError: the prompt leaves the model no position for an answer.
    """
    (completion,) = complete(lm, [Prompt(0, render_prompt(question))], decoding or Decoding()).values()
    return first_turn(completion.text)


def fit_history(lm: GenerationModel, messages: Messages, max_new_tokens: int) -> list[Mapping[str, str]]:
    """The newest messages whose prompt leaves room for an answer; the last one always stays.

    The room is `max_new_tokens`, but at most a quarter of the model's positions, so that a high limit does not drop the
    history. Whole exchanges are dropped, the oldest first, so a prompt begins with a question as in training.
    """
    kept = list(messages)
    longest_prompt = lm.positions - min(max_new_tokens, lm.positions // 4)
    while len(kept) > 1 and lm.token_count(render_prompt(kept)) > longest_prompt:
        kept = kept[2:]
    return kept


def print_sample_answer(run_dir: str | Path, question: str, max_new_tokens: int = 128) -> None:
    """Print the greedy answer of a finished run's model, loaded from the run's folder as its user will load it."""
    text = answer(generation_model_of_run(run_dir), question, Decoding(max_new_tokens=max_new_tokens))
    print(f"{render_prompt(question)} {text}", flush=True)
