"""Triton's kernels in Triton's interpreter, on the virtual device: the CPU's masks, and the exact loss and gradients.

tests/gpu/test_kernels_cuda.py asks the same of the compiled kernels.
"""

import importlib.util
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

import pytest

from isotune.models.packed_attention import DOCUMENT_SDPA, TORCH_VARLEN
from tests import triton_cases
from tests.launching import REPOSITORY, surroundings_of
from tests.triton_cases import CHUNK, DROPOUTS, DTYPES, LOSSES
from tests.virtual_cuda.test_training import check, outcome

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

# the interpreter cuts off the bits that bf16 lacks, where a GPU rounds
VALUES = {"float32": 0.0, "bfloat16": 2**-7, "float16": 0.0}


def cases(names: Iterable[str], *fast: tuple[str, str]) -> list[Any]:
    """Every name with every type; the ones that are not named are slow."""
    every = [(name, dtype) for name in names for dtype in DTYPES]
    assert set(fast) <= set(every)
    return [case if case in fast else pytest.param(*case, marks=pytest.mark.slow) for case in every]


@pytest.mark.parametrize(
    ("name", "dtype"),
    cases(DROPOUTS, ("packed", "float32"), ("packed", "bfloat16"), ("odd sizes", "float16"), ("padded", "float32")),
)
def test_dropouts_kernel_drops_what_the_cpu_drops_forward_and_backward(virtual, name: str, dtype: str):
    check_dropout(virtual(triton_cases.dropout, device="cuda", name=name, dtype=dtype), dtype, VALUES[dtype])


def check_dropout(found: dict, dtype: str, tolerance: float) -> None:
    assert found["calls"] == ["dropout"] * 2
    assert found["dtypes"] == [f"torch.{dtype}"] * 2
    assert found["same masks"] and found["dropped"] + found["kept"] > 0
    assert found["difference"] <= tolerance


# of a norm, rounding included
LOSS = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}


BLOCKS = [("blocks and a bit", dtype) for dtype in DTYPES]


@pytest.mark.parametrize(
    ("name", "dtype"), cases(LOSSES, *BLOCKS, ("scaled and capped", "float32"), ("no targets", "bfloat16"))
)
def test_the_loss_heads_kernel_gives_the_loss_and_gradients_of_fp64(virtual, name: str, dtype: str):
    check_loss(virtual(triton_cases.loss, device="cuda", name=name, dtype=dtype), name, dtype)


def check_loss(found: dict, name: str, dtype: str) -> None:
    case = LOSSES[name]
    positions = case.get("positions", 7)
    assert found["calls"] == ["loss_head"] * -(-positions // CHUNK)
    assert found["zeros"] == (positions == 0)
    assert found["errors"].keys() == {"loss", "hidden", "weight", *(["bias"] if case["bias"] else [])}
    assert all(difference <= LOSS[dtype] for difference in found["difference"].values()), found
    for part, error in found["errors"].items():  # torch's operators round logits to the same type
        assert error <= max(LOSS[dtype], 1.1 * found["torch"][part]), (part, found)


def test_predictions_at_the_edges_have_an_exact_finite_loss(virtual):
    check_edges(virtual(triton_cases.edges, device="cuda"))


def check_edges(found: dict) -> None:
    assert found["summed"] == found["evaluated"] == 200.0
    assert found["gradient"] == [[0.0, 0, 0, 0], [1, -1, 0, 0]]
    assert found["late"] == pytest.approx(6.2146081, rel=1e-6)  # log 500: -inf in all of the first block
    assert found["late gradient"] == pytest.approx([0.0, 0.002, -0.998], abs=1e-7)
    assert found["calls"] == 3


@pytest.mark.slow
def test_probabilities_near_the_smallest_fp16_number_are_not_rounded_away(virtual):
    assert virtual(triton_cases.half_precision, device="cuda") <= 2e-3


def outcome_with_kernels(**case: Any) -> dict[str, Any]:
    """`outcome` of a run whose dropout and loss are the kernels'."""
    with triton_cases.kernels() as calls:
        found = outcome(**case)
    assert set(calls) == {"dropout", "loss_head"}
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "tune"), [("fp32", "full"), ("fp16", "full"), ("bf16", "lora")])
def test_a_run_with_the_kernels_is_that_of_the_cpu(virtual, tmp_path, precision: str, tune: str):
    case = {"kind": "opt", "precision": precision, "tune": tune}
    kernel, waits = DOCUMENT_SDPA if precision == "fp32" else TORCH_VARLEN, 3 if precision == "fp16" else 1
    check(virtual, tmp_path, case, kernel, waits, outcome_with_kernels)


COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from isotune.models.cuda import triton_dropout, triton_loss

def compiled(kernel, capability, types, constants):
    source = ASTSource(kernel, {**types, **dict.fromkeys(constants, "constexpr")}, constants)
    binary = triton.compile(source, GPUTarget("cuda", capability, 32), {"num_warps": 8}).asm["cubin"]
    assert len(binary) > 1000

sizes = {"rows": triton_dropout.ROWS, "columns": triton_dropout.COLUMNS}
types = dict(numbers="*i64", positions="*i64", call="i64", lines="i32", features="i32", threshold="i32", scale="fp32")
for capability, dtype in ((75, "*fp16"), (80, "*bf16"), (90, "*fp32")):
    compiled(triton_dropout._kernel, capability, {"input": dtype, "output": dtype, **types}, sizes)
    types_of_loss = {"logits": dtype, "targets": "*i64", "losses": "*fp32", "vocabulary": "i32", "factor": "fp32"}
    for more, less in (({"bias": dtype, "cap": "fp32"}, {}), ({}, {"bias": None, "cap": None})):
        for with_gradient in (True, False):
            constants = {**less, "with_gradient": with_gradient, "block": triton_loss.BLOCK}
            compiled(triton_loss._kernel, capability, {**types_of_loss, **more, "scale": "fp32"}, constants)
print("compiled")
"""


@pytest.mark.slow
def test_the_kernels_compile_for_a_t4_an_a100_and_an_h100():
    command = [sys.executable, "-c", COMPILED]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=surroundings_of(), check=False)
    assert done.stdout == "compiled\n", done.stderr
