"""What a step asks of a GPU: copies, waits, launches and casts, counted on the virtual device."""

import collections
import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from isotune.models.supervised_loss import supervised_loss
from tests.virtual_cuda.test_training import make


class WeightCasts(TorchDispatchMode):
    """Counts, by name, how often each fp32 weight of a model is cast to another type."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.names = {p.data_ptr(): name for name, p in model.named_parameters() if p.dtype == torch.float32}
        self.counts: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = self.names.get(args[0].data_ptr()) if args and isinstance(args[0], torch.Tensor) else None
        if func is torch.ops.aten._to_copy.default and name is not None:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def count(folder: str, **case: Any) -> dict[str, Any]:
    """The second update of a run: what it asked, what it had waited for before its last backward ended, its casts."""
    from tests.virtual_cuda import device, kernels

    found: dict[str, Any] = {}
    with kernels.of_triton(), contextlib.redirect_stdout(io.StringIO()):
        built = make(Path(folder), **case)
        stock, sync, seen = built.trainer.training_step, built.trainer.update.sync, []
        backward = sync.backward

        def step(*given: Any) -> torch.Tensor:
            seen.append(given)
            if len(seen) == 3:
                within.close()
                found["counts"] = counts[0].as_dict()
                found["casts"] = dict(casts[0].counts)
            if len(seen) == 2:
                counts.append(within.enter_context(device.counting()))
                casts.append(within.enter_context(WeightCasts(built.model)))
            return stock(*given)

        def noted(*given: Any) -> None:
            backward(*given)
            if len(seen) == 2:
                found["waits_before_the_last_backward"] = sum(counts[0].waits.values())
                found["launches"] = dict(counts[0].launches)  # without the sum, the norm and the optimizer's step

        within, counts, casts = contextlib.ExitStack(), [], []
        built.trainer.training_step, sync.backward = step, noted
        built.train()
    found["microbatches"] = len(built.trainer.plan.schedule.step(1).microbatches)
    return found


CASES = {
    "OPT full bf16": {"kind": "opt", "precision": "bf16", "tune": "full"},
    "BERT full bf16": {"kind": "bert", "precision": "bf16", "tune": "full"},
}
MORE = {
    "OPT LoRA bf16": {"kind": "opt", "precision": "bf16", "tune": "lora"},
    "OPT full fp32": {"kind": "opt", "precision": "fp32", "tune": "full"},
    "OPT QLoRA bf16": {"kind": "opt", "precision": "bf16", "tune": "qlora"},
    "BERT LoRA bf16": {"kind": "bert", "precision": "bf16", "tune": "lora"},
    "DistilBERT full bf16": {"kind": "distilbert", "precision": "bf16", "tune": "full"},
}


@pytest.mark.parametrize("name", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_an_update_copies_once_waits_once_and_casts_each_weight_once(virtual, tmp_path, name: str):
    found = virtual(count, folder=str(tmp_path), **{**CASES, **MORE}[name])
    counts = found["counts"]
    assert found["microbatches"] > 2
    assert sum(counts["to_device"].values()) <= 1, counts["to_device"]
    assert not any("pageable" in place for place in counts["to_device"])
    assert sum(counts["waits"].values()) <= 1, counts["waits"]
    assert found["waits_before_the_last_backward"] == 0
    assert set(found["casts"].values()) <= {1}, found["casts"]
    assert bool(found["casts"]) == (name.endswith("bf16"))


# of a layer and microbatch, forward and backward, without compile, as counted here, where a LayerNorm takes several
LAUNCHES = 92


def test_a_layer_launches_no_more_kernels_in_a_microbatch_than_it_did(virtual, tmp_path):
    case = {"kind": "opt", "precision": "bf16", "tune": "full"}
    few, more = (virtual(count, folder=str(tmp_path / str(n)), **case, num_hidden_layers=n) for n in (1, 2))
    assert few["microbatches"] == more["microbatches"]
    totals = [sum(found["launches"].values()) for found in (few, more)]
    a_layer = (totals[1] - totals[0]) / few["microbatches"]
    assert a_layer <= LAUNCHES, a_layer


# of the loss head of a microbatch of 5,000 supervised tokens, forward and backward, in two chunks
HEAD = 15


def head(dtype: str, trains_head: bool, triton: bool) -> dict[str, int]:
    """What a loss head launches."""
    from tests.virtual_cuda import device, kernels

    states = torch.randn(5_000, 16, device="cuda", dtype=getattr(torch, dtype), requires_grad=True)
    weight = torch.randn(500, 16, device="cuda", dtype=getattr(torch, dtype), requires_grad=trains_head)
    targets = torch.zeros(5_000, dtype=torch.int64, device="cuda")
    with kernels.of_triton() if triton else contextlib.nullcontext():
        supervised_loss(states[:2], weight, None, targets[:2])  # torch's products are tried once
        with device.counting() as counts:
            supervised_loss(states, weight, None, targets).backward()
    return dict(counts.launches)


def test_a_loss_head_launches_a_few_kernels_for_thousands_of_positions(virtual):
    with_kernel, without = (virtual(head, dtype="bfloat16", trains_head=True, triton=t) for t in (True, False))
    assert sum(with_kernel.values()) <= HEAD < sum(without.values()) / 10
    assert with_kernel["triton_loss"] == 2
