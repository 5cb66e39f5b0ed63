"""What follows an error of memory on one process: a smaller size where auto chose it, one sentence elsewhere."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tests.building import Built, build, small_opt

from isotune.io.errors import UserError
from isotune.training.failures.out_of_memory import MemoryPlan

LIMIT = 300  # tokens that a forward may see
VALUES: dict[str, Any] = {"global_batch_size": 8, "max_steps": 2, "save_strategy": "no"}
OFTEN = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 4}
PLAN = MemoryPlan(lambda tokens: f"the plan is {tokens} bytes of 300", 0)


def short_of_memory(built: Built, step: int, limit: int = LIMIT) -> list[int]:
    """From this step on, from 1, a training forward of more than `limit` tokens raises; returns their sizes."""
    seen: list[int] = []

    def look(module: Any, inputs: Any, output: torch.Tensor) -> None:
        update = built.trainer.update
        if output.requires_grad and update.result is not None and update.result.step.number + 1 >= step:
            seen.append(output.shape[-2])
            if seen[-1] > limit:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    built.model.get_submodule("model.decoder.layers.0.fc2").register_forward_hook(look)
    return seen


def made(folder: Path, model: str, tokens: int = 512, **more: Any) -> Built:
    values = {**VALUES, "model_name_or_path": model, **more}
    return build(folder, memory=PLAN, **({"chosen_tokens": tokens} if tokens else {}), **values)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return small_opt(tmp_path_factory.mktemp("model") / "opt", dropout=0.1)


def lines_of(built: Built) -> list[tuple]:
    return [tuple(line.get(key) for key in ("loss", "grad_norm", "out_of_memory_retries")) for line in built.steps]


@pytest.mark.parametrize("exact", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_run_that_goes_on_has_the_bits_of_one_that_was_not_stopped(tmp_path, model, exact: bool):
    whole = made(tmp_path / "whole", model, exact_gradients=exact, **OFTEN)
    short_of_memory(whole, 3)
    whole.train()
    assert [retries for *_, retries in lines_of(whole)] == [None, None, 1, 1]
    for killed_after in (1, 3):  # before it and after it
        folder = tmp_path / f"after-{killed_after}"
        shutil.copytree(whole.run.path, folder / "run")
        for step in range(killed_after + 1, 5):
            shutil.rmtree(folder / f"run/checkpoints/step-{step:08d}", ignore_errors=True)
        again = made(folder, model, tokens=256, exact_gradients=exact, **OFTEN)  # as recipe.yaml says
        short_of_memory(again, 3)
        again.train()
        assert again.trainer.checkpointer.resumption.step == killed_after
        assert lines_of(again) == lines_of(whole)
        assert yaml.safe_load((folder / "run/recipe.yaml").read_text())["microbatch_tokens"] == 256


def test_a_size_that_would_change_nothing_is_passed_over(tmp_path, model):
    built = made(tmp_path, model, tokens=256 * 2**10)
    seen = short_of_memory(built, 2)
    built.train()
    assert built.steps[-1]["out_of_memory_retries"] <= 3
    first = built.trainer.plan.schedule.step(1).input_tokens
    tried = [size for size in seen if size > LIMIT]
    assert tried[0] == first and tried == sorted(tried, reverse=True) and len(tried) == len(set(tried))


def test_a_size_that_was_given_is_kept_and_one_sentence_names_it_and_the_plan(tmp_path, model):
    built = made(tmp_path, model, tokens=0, microbatch_tokens=512)
    short_of_memory(built, 2)
    with pytest.raises(UserError) as refused:
        built.train()
    assert str(refused.value) == (
        "training ran out of memory with microbatches of 512 tokens; the plan is 512 bytes of 300: lower "
        "microbatch_tokens (in evaluation eval_microbatch_tokens), or `isotune plan` says what fits"
    )
    assert [line["step"] for line in built.steps] == [1]


def test_where_a_row_does_not_fit_one_sentence_names_the_step(tmp_path, model):
    built = made(tmp_path, model)
    short_of_memory(built, 2, limit=100)
    with pytest.raises(UserError) as refused:
        built.train()
    place = "step 2 ran out of memory with microbatches of 256 tokens, one row; the plan is 256 bytes of 300"
    assert str(refused.value) == f"{place}: `isotune plan` says what fits"
    assert [line["step"] for line in built.steps] == [1]


def test_an_evaluation_as_large_gets_smaller_too_and_one_that_was_given_stays(tmp_path, model):
    for name, given, expected in (("follows", {}, 256), ("given", {"eval_microbatch_tokens": 1024}, 1024)):
        built = made(tmp_path / name, model, eval_dataset_name="builtin:greetings", eval_steps=4, **given)
        built.trainer.memory.repeat_smaller(1)
        assert built.trainer.plan.eval_schedule.microbatch_tokens == expected
        assert built.run.recipe.forward_tokens("eval_microbatch_tokens") == expected


def test_other_errors_stay_what_they_are(tmp_path, model):
    built = made(tmp_path, model)

    def fail(*_: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    built.model.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        built.train()
