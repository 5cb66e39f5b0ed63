"""With every dropout on, the memory knob changes no result: whole runs at several sizes of a microbatch.

Before masks belonged to documents, these losses differed by up to 7% and the gradient norms by up to 50%.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.building import Built, build, build_classifier, small_encoder, small_opt
from transformers import LlamaConfig, LlamaForCausalLM

from isotune.models.base.builtin import builtin_tokenizer

UPDATES = 8
ON = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "classifier_dropout": 0.1}
ALBERT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "classifier_dropout_prob": 0.1}
SFT = {"learning_rate": 1e-3, "max_steps": UPDATES, "global_batch_size": 8, "save_strategy": "no"}
CLASSIFIER = {**SFT, "global_batch_size": 24, "eval_dataset_name": None}


def small_llama(folder: Path) -> str:
    """A random Llama of a few thousand parameters with grouped queries and dropout of attention weights."""
    tokenizer = builtin_tokenizer("builtin:opt-tiny")
    torch.manual_seed(7)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=len(tokenizer), max_position_embeddings=256, attention_dropout=0.1, initializer_range=0.1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def opt(folder: Path, **values: Any) -> Built:
    """A run of OPT with dropout of hidden states and attention weights, and layers left out at random."""
    model = small_opt(folder / "model", dropout=0.1, attention_dropout=0.1, layerdrop=0.1)
    return build(folder, **{**SFT, "model_name_or_path": model, **values})


def llama(folder: Path, **values: Any) -> Built:
    """A run of Llama."""
    return build(folder, **{**SFT, "model_name_or_path": small_llama(folder / "model"), **values})


def encoder(kind: str, **config: Any) -> Callable[..., Built]:
    """A run of a classifier of this kind."""

    def run(folder: Path, **values: Any) -> Built:
        model = small_encoder(folder / "model", kind, **config)
        return build_classifier(folder, **{**CLASSIFIER, "model_name_or_path": model, **values})

    return run


# AdamW makes a full step of a gradient of the size of rounding, which LoRA's first ones have, unless epsilon is larger
ADAPTERS = {"tune": "lora", "lora_dropout": 0.1, "learning_rate": 1e-2, "adam_epsilon": 1e-5}
RUNS: dict[str, tuple[Callable[..., Built], dict[str, Any], list[int]]] = {
    "OPT, full": (opt, {}, [256, 512, 1024, 2048]),
    "OPT, LoRA": (opt, ADAPTERS, [256, 512, 1024, 2048]),
    "Llama, full": (llama, {}, [256, 512, 1024, 2048]),
    "Llama, LoRA": (llama, ADAPTERS, [256, 512, 1024, 2048]),
    "BERT": (encoder("bert", **ON), {}, [64, 128, 256, 1600]),
    "ALBERT": (encoder("albert", **ALBERT), {}, [64, 128, 256, 1600]),
    "ELECTRA, padded": (encoder("electra", **ON), {}, [64, 128, 256, 1600]),
}


def train(name: str, folder: Path, microbatch_tokens: int, **values: Any) -> tuple[list[float], list[float], int]:
    """Losses and gradient norms of the updates, and the microbatches of the first."""
    run, own, _ = RUNS[name]
    built = run(folder, **{**own, "microbatch_tokens": microbatch_tokens, **values})
    microbatches = len(built.trainer.plan.schedule.step(0).microbatches)
    built.train()
    assert len(built.steps) == UPDATES
    return [line["loss"] for line in built.steps], [line["grad_norm"] for line in built.steps], microbatches


IN_SHORT = ("OPT, LoRA", "ELECTRA, padded")


def short_and_slow(*names: str, quick: tuple[str, ...] = IN_SHORT) -> list[Any]:
    """The names of runs, those that are not quick as slow tests."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        *((name, (RUNS[name][2][0], RUNS[name][2][-1])) for name in IN_SHORT),
        *(pytest.param(name, sizes, marks=pytest.mark.slow) for name, (*_, sizes) in RUNS.items()),
    ],
)
def test_the_size_of_a_microbatch_changes_rounding_only(name: str, sizes: Sequence[int], tmp_path: Path):
    losses, norms, most = train(name, tmp_path / "smallest", sizes[0])
    for tokens in sizes[1:]:
        other_losses, other_norms, microbatches = train(name, tmp_path / str(tokens), tokens)
        assert microbatches < most
        assert other_losses == pytest.approx(losses, rel=1e-6), tokens
        assert other_norms == pytest.approx(norms, rel=1e-5), tokens
    assert microbatches == 1, "the largest sees all rows of a step at once"


@pytest.mark.parametrize(
    "name", short_and_slow("OPT, full", "OPT, LoRA", "BERT", "ELECTRA, padded", quick=("OPT, LoRA",))
)
def test_gradient_checkpointing_in_microbatches_of_another_size_changes_rounding_only(name: str, tmp_path: Path):
    sizes = RUNS[name][2]
    losses, norms, _ = train(name, tmp_path / "kept", sizes[0])
    others = train(name, tmp_path / "recomputed", sizes[-1], gradient_checkpointing=True)
    assert others[0] == pytest.approx(losses, rel=1e-6) and others[1] == pytest.approx(norms, rel=1e-5)


@pytest.mark.parametrize("name", short_and_slow("OPT, full", "OPT, LoRA", "BERT", quick=("OPT, full",)))
def test_in_bf16_too(name: str, tmp_path: Path):
    sizes = RUNS[name][2]
    losses, norms, _ = train(name, tmp_path / "small", sizes[0], bf16=True)
    others = train(name, tmp_path / "large", sizes[-1], bf16=True)
    assert others[0] == pytest.approx(losses, rel=2e-3) and others[1] == pytest.approx(norms, rel=2e-2)


def test_dropout_is_on_in_these_runs(tmp_path: Path):
    for name in ("OPT, LoRA",):
        one, other = (train(name, tmp_path / f"{name} {seed}", RUNS[name][2][0], seed=seed) for seed in (1, 2))
        assert one[0] != pytest.approx(other[0], rel=1e-3)
