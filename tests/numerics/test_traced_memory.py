"""A pass traced on tensors without contents holds what torch's allocator hands out for the same pass."""

import gc

import pytest
import torch
from tests.launching import TINY, TINY_CLASSIFIER
from torch.profiler import ProfilerActivity, profile
from transformers import BertConfig, OPTConfig

from isotune.models.adapters import add_adapters
from isotune.models.classifier import head_of, install_classification
from isotune.models.packed_attention import set_packed_attention
from isotune.models.speedups import enable_speedups, training_pass
from isotune.models.supervised_loss import forget_workspaces, install_supervised_loss
from isotune.planner.model_facts import builder
from isotune.planner.traced import trace_pass
from isotune.recipe import ClassificationRecipe, Recipe

LAYERS = 4
SMALL = {"hidden_size": 192, "num_hidden_layers": LAYERS, "num_attention_heads": 6, "vocab_size": 4000}
# masks are drawn by numpy, which torch's allocator does not see: without dropout there are none
OPT = OPTConfig(**SMALL, ffn_dim=768, word_embed_proj_dim=192, max_position_embeddings=1024, dropout=0.0)
BERT = BertConfig(**SMALL, intermediate_size=768, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def recipe_of(kind: str, tune: str) -> Recipe | ClassificationRecipe:
    values = {"output_dir": "runs/none", "tune": tune, "bf16": True, "max_steps": 1}
    if tune == "lora":
        values |= {"lora_dropout": 0.0}
    if kind == "opt":
        return Recipe.from_values(**{**TINY, **values})
    return ClassificationRecipe.from_values(**{**TINY_CLASSIFIER, **values, "num_labels": 3})


def real_model(kind: str, recipe) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    dtype = torch.float32 if recipe.tune == "full" else torch.bfloat16
    if kind == "opt":
        base = AutoModelForCausalLM.from_config(OPT, dtype=dtype)
        set_packed_attention(base)
        install_supervised_loss(base)
        return base if recipe.tune == "full" else add_adapters(base, recipe)
    BERT.num_labels = 3
    base = AutoModelForSequenceClassification.from_config(BERT, dtype=dtype)
    install_classification(base)
    return base if recipe.tune == "full" else add_adapters(base, recipe, head=head_of(BERT))


def inputs(lengths: list[int], kind: str) -> dict:
    tokens = sum(lengths)
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    given = {"input_ids": torch.randint(5, 4000, (1, tokens)), "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
    given |= {"max_length_q": max(lengths), "max_length_k": max(lengths)}
    if kind == "bert":
        return {**given, "targets": torch.zeros(len(lengths), dtype=torch.int64)}
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    supervised = torch.arange(tokens // 2)
    return {**given, "position_ids": positions, "supervised_positions": supervised, "targets": supervised % 4000}


def allocated_peak(model: torch.nn.Module, given: dict) -> int:
    """The most that torch's CPU allocator had handed out during a pass, beyond what was there before."""
    enable_speedups(model)
    model.train()
    forget_workspaces()
    gc.collect()
    with (
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen,
        torch.autocast("cpu", dtype=torch.bfloat16),
        training_pass(model),
    ):
        model(**given, use_cache=False).loss.backward()
    forget_workspaces()
    held = most = 0
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("tune", ["full", "lora"])
@pytest.mark.parametrize(("kind", "lengths"), [("opt", [700, 200]), ("bert", [400, 300, 120])])
def test_a_traced_pass_holds_what_the_allocator_hands_out(kind, lengths, tune, checkpointing):
    recipe = recipe_of(kind, tune)
    targets = sum(lengths) // 2 if kind == "opt" else len(lengths)
    traced = trace_pass(
        builder(recipe, OPT if kind == "opt" else BERT, 3),
        LAYERS,
        lengths,
        targets,
        is_classifier=kind == "bert",
        autocast=torch.bfloat16,
        on_cpu=True,
        checkpointing=checkpointing,
    )
    model = real_model(kind, recipe)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    assert traced.with_gradients == pytest.approx(allocated_peak(model, inputs(lengths, kind)), rel=0.15)
