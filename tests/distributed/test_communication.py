"""Gradients travel once an update, however many passes a rank makes: counted at the backend."""

from pathlib import Path

import pytest
from tests.distributed.engines import Engine, config_of, engine, recipes
from tests.launching import Finished, start_together

GRADIENT_COLLECTIVES = ("all_reduce", "reduce", "reduce_scatter", "_reduce_scatter_base", "reduce_scatter_tensor")
FEW_ROWS, MANY_ROWS = 2, 8  # of a step: one and four passes a rank, on two of them


def counted(folder: Path, one: Engine, **values) -> tuple[Finished, Finished]:
    """LoRA under `one` with few and with many passes a step, the second step counted."""
    runs = {
        f"{rows} rows": recipes(folder, max_steps=2, global_batch_size=rows, exact_gradients=False, **values)["lora"]
        for rows in (FEW_ROWS, MANY_ROWS)
    }
    place = folder / one.name.replace(" ", "_")
    done = start_together(place, runs, processes=one.processes, config=config_of(one, folder), counted_step=2)
    return done[f"{FEW_ROWS} rows"], done[f"{MANY_ROWS} rows"]


def sent(finished: Finished) -> list[int]:
    """Collectives that carry gradients or norms, of each rank."""
    return [sum(rank.get(name, 0) for name in GRADIENT_COLLECTIVES) for rank in finished.collectives]


@pytest.mark.parametrize("name", ["DDP on 2", "ZeRO-2 on 2", "FSDP2 on 2"])
def test_four_passes_a_rank_send_no_more_than_one(tmp_path: Path, name):
    few, many = counted(tmp_path, engine(name))
    assert [rank["passes"] for rank in few.collectives] == [1, 1]
    assert [rank["passes"] for rank in many.collectives] == [4, 4]
    assert min(sent(few)) > 0
    assert sent(few) == sent(many)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ZeRO-0 on 2", "ZeRO-1 on 2", "ZeRO-3 on 2"])
def test_nor_under_the_other_stages(tmp_path: Path, name):
    few, many = counted(tmp_path, engine(name))
    assert min(sent(few)) > 0 and sent(few) == sent(many)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ZeRO-2 on 2", "ZeRO-3 on 2"])
def test_gradient_reduction_pass_sends_after_each_pass_and_changes_no_figure(tmp_path: Path, name):
    once = counted(tmp_path / "once", engine(name))[1]
    each = counted(tmp_path / "each", engine(name), gradient_reduction="pass")[1]
    assert min(sent(each)) > max(sent(once))
    for a, b in zip(once.steps, each.steps, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)
