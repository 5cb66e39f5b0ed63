"""A run on a device whose allocator raises: it goes on in smaller microbatches, with the figures of the undisturbed."""

import contextlib
import gc
import io
from pathlib import Path
from typing import Any

import pytest
import torch

from isotune.io.errors import UserError
from isotune.training.failures.out_of_memory import MemoryPlan
from tests.building import Built
from tests.virtual_cuda.test_training import make

LARGE, SMALL = 1024, 512
CASE: dict[str, Any] = {"kind": "opt", "global_batch_size": 8, "max_steps": 3}


def trained(folder: Path, tokens: int, limit: int = 0, step: int = 0, **more: Any) -> tuple[Built, str]:
    """A run that begins with microbatches of `tokens`, whose device has `limit` bytes from step `step` (from 1) on.

    0: from before the first step on. Returns what it printed too.
    """
    from tests.virtual_cuda import device

    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()):
        built = make(folder, **CASE, **{"chosen_tokens": tokens, **more})
        stock = built.trainer.training_step

        def training_step(model: Any, inputs: Any, *rest: Any) -> Any:
            if step and inputs["step"].number + 1 == step:
                device.limit_memory(limit)
            return stock(model, inputs, *rest)

        built.trainer.training_step = training_step
        try:
            if not step:
                device.limit_memory(limit)
            built.train()
        finally:
            device.limit_memory(0)
    return built, said.getvalue()


def figures(built: Built) -> dict[str, Any]:
    keys = ("loss", "grad_norm", "out_of_memory_retries")
    found = {key: [line.get(key) for line in built.steps] for key in keys}
    return found | {"tokens": built.run.recipe.forward_tokens("microbatch_tokens")}


def undisturbed(folder: Path, tokens: int, **more: Any) -> tuple[dict[str, Any], int, int]:
    """Figures of a run, the memory that it takes, and the part of it that is the optimizer's state."""
    gc.collect()
    before = torch.cuda.memory_allocated()
    built, _ = trained(folder / str(tokens), tokens, **more)
    state = sum(8 * p.numel() for p in built.model.parameters() if p.requires_grad)
    return figures(built), max(line["peak_memory_bytes"] for line in built.steps) - before, state


def limited(folder: str, cases: dict[str, list], **more: Any) -> dict[str, Any]:
    """An undisturbed run, and one a case, whose device is too small for its microbatches from a step on.

    A case is that step, and where the memory lies from what half as large microbatches take (0) to what they take (1).
    """
    place = Path(folder)
    whole, large, state = undisturbed(place, LARGE, **more)
    _, small, _ = undisturbed(place, SMALL, **more)
    found: dict[str, Any] = {"whole": whole}
    for name, (step, share) in cases.items():
        gc.collect()
        limit = torch.cuda.memory_allocated() + int(small + share * (large - small))
        plan = MemoryPlan(lambda tokens: "the plan is too small", state)
        try:
            built, said = trained(place / name, LARGE, limit, step, memory=plan, **more)
            lines = [line for line in said.splitlines() if line.startswith("microbatch  ")]
            found[name] = figures(built) | {"said": lines}
            del built
        except UserError as error:
            found[name] = {"error": str(error), "left": [file.name for file in (place / name / "run").glob("*")]}
    return found


CASES = {"at step 2": [2, 0.5], "from the start": [0, 0.95], "without room for a row": [0, -1.0]}


@pytest.fixture(scope="module")
def found(virtual, tmp_path_factory) -> dict[str, Any]:
    """The cases in full tuning."""
    return virtual(limited, folder=str(tmp_path_factory.mktemp("limited")), cases=CASES)


def check_repeated(found: dict[str, Any], rounding: str) -> None:
    whole, short = found["whole"], found["at step 2"]
    assert short["out_of_memory_retries"] == [None, 1, 1] and short["tokens"] == SMALL
    assert short["loss"] == pytest.approx(whole["loss"], rel=1e-6)
    assert short["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-5)
    place = "microbatch  512 tokens from step 2 on, which is repeated: 1,024 ran out of memory; "
    assert short["said"] == [place + rounding]


def test_an_update_is_repeated_with_the_losses_of_the_undisturbed_run(found):
    check_repeated(found, "it changes rounding only")


@pytest.mark.slow
def test_so_it_is_where_integers_are_summed(virtual, tmp_path):
    case = {"at step 2": CASES["at step 2"]}
    bits = "its bits are those of 512 tokens from here on, to rounding those of 1,024"
    check_repeated(virtual(limited, folder=str(tmp_path), cases=case, tune="lora"), bits)


def test_the_costliest_microbatch_is_tried_before_the_first_step_beside_the_optimizer(found):
    whole, short = found["whole"], found["from the start"]
    assert short["out_of_memory_retries"] == [None] * 3 and short["tokens"] == SMALL
    assert short["loss"] == pytest.approx(whole["loss"], rel=1e-6)
    assert short["said"] == ["microbatch  512 tokens: 1,024 ran out of memory when the costliest was tried"]


def test_where_not_even_a_row_fits_a_sentence_has_the_plan_and_nothing_is_written(found):
    place = "the costliest microbatch ran out of memory with microbatches of 256 tokens, one row"
    refused = found["without room for a row"]
    assert refused["error"] == f"{place}; the plan is too small: `isotune plan` says what fits"
    assert refused["left"] == []
