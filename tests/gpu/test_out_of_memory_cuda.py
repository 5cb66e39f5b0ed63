"""A CUDA device whose memory is limited: a run goes on in smaller microbatches, with the figures of the undisturbed."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.building import Built, build, small_opt

from isotune.training.failures.out_of_memory import MemoryPlan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

LARGE, SMALL = 1024, 512
STATE = 8 * 4 * 12 * 1024**2  # bytes of AdamW's state of the blocks below, the most of the model
# wide, so that a microbatch takes hundreds of megabytes and the allocator's blocks of 20 do not matter
GEOMETRY = {"hidden_size": 1024, "word_embed_proj_dim": 1024, "ffn_dim": 4096, "num_hidden_layers": 4}


def limit_memory(total: int | None) -> None:
    """Let this process have `total` bytes of the device; None: all. What it has already is not taken away."""
    torch.cuda.empty_cache()
    whole = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(1.0 if total is None else total / whole)


def trained(folder: Path, model: str, tokens: int, limit: int | None = None, step: int = 0) -> Built:
    """A run that begins with microbatches of `tokens`, and has `limit` bytes from step `step` on; 0: from the start."""
    gc.collect()
    torch.cuda.empty_cache()
    values: dict[str, Any] = {"model_name_or_path": model, "global_batch_size": 8, "max_steps": 4}
    values |= {"save_strategy": "no", "learning_rate": 1e-5, "chosen_tokens": tokens}
    built = build(folder, memory=MemoryPlan(lambda tokens: "", STATE), **values)
    stock = built.trainer.training_step

    def training_step(given: Any, inputs: Any, *rest: Any) -> Any:
        if inputs["step"].number + 1 == step:
            limit_memory(limit)
        return stock(given, inputs, *rest)

    built.trainer.training_step = training_step
    if step == 0:
        limit_memory(limit)
    try:
        built.train()
    finally:
        limit_memory(None)
    return built


@pytest.mark.parametrize("step", [0, 2])
def test_a_run_goes_on_with_the_losses_of_the_undisturbed_one(tmp_path, step: int):
    model = small_opt(tmp_path / "opt", **GEOMETRY, dropout=0.1)
    large, small = (trained(tmp_path / str(tokens), model, tokens).steps for tokens in (LARGE, SMALL))
    enough, needed = max(s["peak_reserved_bytes"] for s in small), max(s["peak_memory_bytes"] for s in large)
    assert enough < needed
    short = trained(tmp_path / "short", model, LARGE, limit=(enough + needed) // 2, step=step)
    assert short.run.recipe.forward_tokens("microbatch_tokens") == SMALL
    assert short.steps[-1].get("out_of_memory_retries") == (1 if step else None)
    assert [s["loss"] for s in short.steps] == pytest.approx([s["loss"] for s in large], rel=1e-5)
    assert [s["grad_norm"] for s in short.steps] == pytest.approx([s["grad_norm"] for s in large], rel=1e-4)
