"""How the tests build a run in their own process: the same functions in the same order as train/sft_opt.py."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, OPTConfig, OPTForCausalLM

from isotune.config import ClassificationRecipe, Recipe, RunRecipe
from isotune.data.classification.split import prepare_labelled
from isotune.data.documents import Documents
from isotune.data.sft.preparation import prepare_conversations
from isotune.models.base.builtin import builtin_tokenizer
from isotune.run.run_dir import RunDir
from isotune.training.failures.out_of_memory import MemoryPlan
from isotune.training.from_recipe import Start, build_model, build_trainer, start_run
from isotune.training.trainer import PlannedTraining
from tests.launching import TINY, TINY_CLASSIFIER

OPT_350M: dict[str, Any] = {"hidden_size": 1024, "word_embed_proj_dim": 512, "ffn_dim": 4096, "num_hidden_layers": 24}
OPT_350M |= {"num_attention_heads": 16, "do_layer_norm_before": False}
BIASES_WITHOUT_GRADIENT = "k_proj.bias"  # a shift that all keys share leaves every softmax as it is: zero on paper


@dataclass(frozen=True)
class Built:
    """A run that is ready to train, and its parts."""

    start: Start
    model: nn.Module
    trainer: PlannedTraining

    @property
    def recipe(self) -> RunRecipe:
        """What was asked for."""
        return self.start.recipe

    @property
    def run(self) -> RunDir:
        """Its folder."""
        return self.start.run

    @property
    def tokenizer(self) -> Any:
        """Of its model."""
        return self.start.tokenizer

    def train(self) -> list[dict[str, Any]]:
        """Train; returns the lines of metrics.jsonl."""
        self.trainer.train()
        return self.lines

    @property
    def lines(self) -> list[dict[str, Any]]:
        """Every line of metrics.jsonl."""
        return [json.loads(line) for line in (self.run.path / "metrics.jsonl").read_text().splitlines()]

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The training lines of metrics.jsonl."""
        return [line for line in self.lines if "loss" in line]


def build(folder: Path, *, chosen_tokens: int | None = None, memory: MemoryPlan | None = None, **values: Any) -> Built:
    """Build the run of TINY with `values` in `folder/run`, on this machine's one process.

    `chosen_tokens` are those that `microbatch_tokens: auto` chose, by a plan of `memory`.
    """
    # an engine's state outlives its Trainer in a process; a run of another precision needs a new one
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    recipe = Recipe.from_values(**{**TINY, "output_dir": str(folder / "run"), **values})
    start = replace(start_run(recipe), memory=memory)
    if chosen_tokens is not None:
        start = start.with_values(microbatch_tokens=chosen_tokens)
    data = prepare_conversations(recipe, start.tokenizer, show=start.process.is_main)
    model = build_model(start, data)
    return Built(start, model, build_trainer(start, model, data))


def build_classifier(folder: Path, **values: Any) -> Built:
    """The same of train/imdb.py: the run of TINY_CLASSIFIER with `values`."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    recipe = ClassificationRecipe.from_values(**{**TINY_CLASSIFIER, "output_dir": str(folder / "run"), **values})
    start = start_run(recipe)
    data = prepare_labelled(recipe, start.tokenizer, show=start.process.is_main)
    model = build_model(start, data)
    return Built(start, model, build_trainer(start, model, data))


def small_encoder(folder: Path, kind: str, **config: Any) -> str:
    """A random encoder of a few thousand parameters without a head, saved with the built-in tokenizer."""
    tokenizer = builtin_tokenizer("builtin:bert-tiny")
    small: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    small |= {"intermediate_size": 64, "max_position_embeddings": 130}
    if kind == "distilbert":
        small = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 130}
    if kind == "albert":
        small |= {"embedding_size": 16}
    torch.manual_seed(7)
    model = AutoModel.from_config(
        AutoConfig.for_model(
            kind, vocab_size=len(tokenizer), pad_token_id=1, initializer_range=0.1, **{**small, **config}
        )
    )
    for parameter in model.parameters():  # biases start at zero, which would hide what depends on them
        if parameter.ndim == 1:
            parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def small_opt(folder: Path, **config: Any) -> str:
    """A random OPT of a few thousand parameters, saved as a user's local model with the built-in tokenizer."""
    tokenizer = builtin_tokenizer("builtin:opt-tiny")
    small = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 4, "max_position_embeddings": 256, "vocab_size": len(tokenizer)}
    small |= {"dropout": 0.0, "attention_dropout": 0.0, "init_std": 0.1}
    torch.manual_seed(7)
    model = OPTForCausalLM(OPTConfig(**{**small, **config}))
    for parameter in model.parameters():  # biases start at zero, which would hide what depends on them
        if parameter.ndim == 1:
            parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def small_experts(folder: Path, kind: str = "mixtral", **config: Any) -> str:
    """A random mixture of 4 experts whose routers prefer some of them, saved with the built-in tokenizer."""
    tokenizer = builtin_tokenizer("builtin:opt-tiny")
    small: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256}
    small |= {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "tie_word_embeddings": False}
    small |= {"bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1}
    small |= {"num_local_experts" if kind in ("mixtral", "gpt_oss") else "num_experts": 4}
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, vocab_size=len(tokenizer), **{**small, **config})
    )
    for name, parameter in model.named_parameters():
        if "gate." in name or "router." in name:
            nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def each_document(documents: Documents) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids, int64 [tokens], and the mask of targets, bool [tokens], of one document after the other."""
    for start, stop in zip(documents.starts[:-1], documents.starts[1:], strict=True):
        ids = torch.tensor(documents.input_ids[start:stop].tolist())
        yield ids, torch.tensor(documents.supervised[start:stop].tolist())


def loss_of_document(model: Any, ids: torch.Tensor, supervised: torch.Tensor) -> torch.Tensor:
    """Summed cross-entropy of a document's targets, by the model's plain forward over this document alone."""
    logits = model(input_ids=ids[None].to(model.device)).logits[0, :-1].float()
    losses = nn.functional.cross_entropy(logits, ids[1:].to(model.device), reduction="none")
    return losses[supervised[1:].to(model.device)].sum()
