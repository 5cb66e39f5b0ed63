"""On a CUDA device a plan's memory is what torch's allocator hands out: to within 10% for what fits into 24 GiB."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.building import OPT_350M, Built, build
from transformers import OPTConfig

from isotune.models.base.builtin import builtin_tokenizer
from isotune.preflight.preflight_report import run_preflight
from isotune.preflight.request import PLAIN, Launch, PreflightRequest

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

LIMIT = 0.10
SHARED: dict[str, Any] = {"dataset_name": "builtin:capitals", "max_seq_length": 1024, "bf16": True, "max_steps": 2}
SHARED |= {"save_strategy": "no"}
OPT_6_7B: dict[str, Any] = {"hidden_size": 4096, "word_embed_proj_dim": 4096, "ffn_dim": 16384, "num_hidden_layers": 32}
OPT_6_7B |= {"num_attention_heads": 32}


def random_model(folder: Path, geometry: dict[str, Any]) -> str:
    """A model of this form with random 16-bit weights, saved on its own device: there is no download."""
    from transformers import AutoModelForCausalLM

    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(OPTConfig(**geometry), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    builtin_tokenizer("builtin:opt-tiny").save_pretrained(folder)
    del model
    torch.cuda.empty_cache()
    return str(folder)


def most_allocated_in_the_last_step(built: Built) -> int:
    """Bytes from the beginning of the second update to the end of its optimizer step: moments are there by then."""
    stock = built.trainer.training_step

    def step(*given: Any) -> torch.Tensor:
        torch.cuda.reset_peak_memory_stats()
        return stock(*given)

    built.trainer.training_step = step
    built.train()
    return torch.cuda.max_memory_allocated()


@pytest.mark.parametrize(
    ("geometry", "values"),
    [
        (OPT_350M, {"tune": "full"}),
        (OPT_350M, {"tune": "full", "gradient_checkpointing": True}),
        (OPT_350M, {"tune": "lora", "r": 16}),
        (OPT_6_7B, {"tune": "qlora", "r": 16, "gradient_checkpointing": True, "bnb_4bit_use_double_quant": True}),
    ],
    ids=["350m-full", "350m-full-recomputed", "350m-lora", "6.7b-qlora"],
)
def test_a_plan_for_24_gib_is_what_the_allocator_hands_out(tmp_path, geometry, values):
    if values["tune"] == "qlora":
        pytest.importorskip("bitsandbytes")
    model = random_model(tmp_path / "model", geometry)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    built = build(tmp_path, **SHARED, **values, model_name_or_path=model, global_batch_size=2)
    limit = 24 * 2**30
    plan = run_preflight(PreflightRequest(built.recipe, Launch(PLAIN, 1), ()), limit=limit, show_progress=False)
    assert plan.fits
    found = most_allocated_in_the_last_step(built) - before
    assert plan.memory.total - plan.memory.margin == pytest.approx(found, rel=LIMIT)
