"""Gradients travel once an update, however many passes a rank makes; what travels and is held is what a plan says.

Counted in real steps, at the backend and in the tensors that the engine keeps.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tests.distributed.engines import Engine, config_of, engine, recipes
from tests.launching import REPOSITORY, Finished, start_together

from isotune.preflight.preflight_report import PreflightReport, run_preflight
from isotune.preflight.request import read_preflight_request
from isotune.preflight.resources.sharding import Sharding

GRADIENT_COLLECTIVES = ("all_reduce", "reduce", "reduce_scatter", "_reduce_scatter_base", "reduce_scatter_tensor")
FEW_ROWS, MANY_ROWS = 2, 8  # of a step: one and four passes a rank, on two of them
SMALL_TALK_BYTES = 200  # losses and norms of a step and its microbatches
BYTES_OF_A_MAXIMUM = 8  # the largest gradient of each trained tensor, where integers are summed
BYTES_OF_A_NORM = 7 * 8  # six words of the sum of squares and whether it is a number, where ranks hold shares of it

Launched = dict[str, Finished]


def launch(folder: Path, one: Engine, **values: Any) -> Launched:
    """Runs of two steps under `one` in the processes of one launch, the second step counted."""
    many = recipes(folder, max_steps=2, global_batch_size=MANY_ROWS, **values)
    for recipe in many.values():
        del recipe["eval_dataset_name"]
    lora = many["lora"] | {"exact_gradients": False}
    runs = {"few": lora | {"global_batch_size": FEW_ROWS}, "many": lora, "full": many["full"]}
    if one.kind != "DDP":  # whose sums and moments are fp32 whatever the products are
        runs |= {"bf16": many["full"] | {"bf16": True}, "lora_bf16": lora | {"bf16": True}}
    if one.kind in ("DDP", "FSDP") or one.zero_stage == 3:
        runs["exact"] = many["lora"] | {"exact_gradients": True, "optim": "adamw_torch"}
    place = folder / one.name.replace(" ", "_")
    return start_together(place, runs, processes=one.processes, config=config_of(one, folder), counted_step=2)


@pytest.fixture(scope="module")
def launched(tmp_path_factory) -> Callable[[str], Launched]:
    """The launch of an engine, made once."""
    made: dict[str, Launched] = {}

    def of(name: str) -> Launched:
        if name not in made:
            made[name] = launch(tmp_path_factory.mktemp("launch"), engine(name))
        return made[name]

    return of


def sent(finished: Finished) -> list[int]:
    """Collectives that carry gradients or norms, of each rank."""
    return [sum(rank.get(name, 0) for name in GRADIENT_COLLECTIVES) for rank in finished.collectives]


def planned(finished: Finished, one: Engine) -> PreflightReport:
    """The plan of a run of `launch`."""
    return _planned(finished.run.parent, one)


@functools.cache
def _planned(folder: Path, one: Engine) -> PreflightReport:
    config = str(REPOSITORY / "accelerate_configs" / config_of(one, folder))
    asked = read_preflight_request(folder / "recipe.yaml", [], config, one.processes)
    assert asked.problems == ()
    return run_preflight(asked, show_progress=False)


OTHERS = ("ZeRO-0", "ZeRO-1", "ZeRO-2", "ZeRO-3", "FSDP2")
EVERY_ENGINE = ["DDP on 2", *(pytest.param(f"{name} on 2", marks=pytest.mark.slow) for name in OTHERS)]


@pytest.mark.parametrize("name", EVERY_ENGINE)
def test_four_passes_a_rank_send_no_more_than_one(launched, name):
    few, many = launched(name)["few"], launched(name)["many"]
    assert [rank["passes"] for rank in few.collectives] == [1, 1]
    assert [rank["passes"] for rank in many.collectives] == [4, 4]
    assert min(sent(few)) > 0
    assert sent(few) == sent(many)


@pytest.mark.parametrize("name", EVERY_ENGINE)
def test_a_rank_sends_the_bytes_that_the_plan_says(launched, name):
    for which, finished in launched(name).items():
        plan = planned(finished, engine(name))
        assert plan.work is not None
        says = Sharding(plan.request.recipe, plan.model, plan.request.launch).collectives(
            plan.work.microbatches_per_rank
        )
        (saved,) = (finished.run / "model").glob("*.safetensors")
        small_talk = SMALL_TALK_BYTES
        if which == "exact":
            small_talk += BYTES_OF_A_MAXIMUM * len(load_file(saved))
            small_talk += BYTES_OF_A_NORM if engine(name).kind == "FSDP" or engine(name).zero_stage == 3 else 0
        for rank in finished.collectives:
            for kind in ("all_reduce", "reduce_scatter", "all_gather"):
                found = rank["bytes"].get(kind, 0)
                assert 0 <= found - says.get(kind, 0) <= small_talk, f"{which}, {kind}"


@pytest.mark.parametrize("name", EVERY_ENGINE[:-1])
def test_a_rank_holds_the_gradients_and_optimizer_that_the_plan_says(launched, name):
    # in a step of one pass ZeRO-1 and 2 reduce within it, before anybody can look
    runs = {which: finished for which, finished in launched(name).items() if which != "few"}
    for which, finished in runs.items():
        memory = planned(finished, engine(name)).memory
        held = finished.collectives[0]["held"]
        found = held["together"]
        if name == "ZeRO-2 on 2" and "bf16" in which:  # both are there for a moment inside the reduction
            found = held["gradients"] + held["engine"]
        assert found == memory.gradients, which
        assert held["optimizer"] == memory.optimizer, which
        assert held["master_copies"] == memory.master_copies, which


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ZeRO-2 on 2", "ZeRO-3 on 2"])
def test_gradient_reduction_pass_sends_after_each_pass_and_changes_no_figure(launched, tmp_path: Path, name):
    once = launched(name)["many"]
    each = launch(tmp_path, engine(name), gradient_reduction="pass")["many"]
    assert min(sent(each)) > max(sent(once))
    for a, b in zip(once.steps, each.steps, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)
