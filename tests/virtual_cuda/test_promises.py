"""What a run promises on a GPU: masks by document, the same bits after a stop, one GPU a process, its memory."""

import contextlib
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from isotune.io.errors import RunFault
from isotune.models.document_dropout import training_microbatch
from isotune.models.document_keys import MicrobatchDocuments
from isotune.models.isolation import check_isolation
from isotune.models.packed_attention import DOCUMENT_SDPA, last_kernel, packed_attention
from isotune.training import callbacks
from tests.virtual_cuda.test_training import close, make, outcome

# ---- dropped attention weights ----

LENGTHS = {4: 5, 9: 12, 2: 1, 7: 8}  # tokens of a document by its number


def attend(
    numbers: list[int], seed: int = 3, known: bool = True, autocast: bool = False, **form: Any
) -> dict[str, Any]:
    """Output and gradient of the query, by document, of a row of these documents in packed attention with dropout."""
    inputs = {n: torch.randn(3, 4, LENGTHS[n], 8, generator=torch.Generator().manual_seed(n)) for n in numbers}
    row = torch.cat([inputs[n] for n in numbers], dim=2).to("cuda").requires_grad_()
    lengths = [LENGTHS[n] for n in numbers]
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device="cuda")
    torch.manual_seed(seed)
    torch.cuda.manual_seed(len(numbers))  # which must not matter
    if form.pop("sinks", False):
        form["s_aux"] = torch.linspace(-1, 2, 4).to("cuda")
    documents = MicrobatchDocuments(numbers, lengths)
    with (
        training_microbatch(documents) if known else contextlib.nullcontext(),
        torch.autocast("cuda", enabled=autocast),
    ):
        query, key, value = row.unsqueeze(1)
        out, _ = packed_attention(
            nn.Module(), query, key, value, None, dropout=0.3, is_causal=True,
            cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, max_length_q=max(lengths), max_length_k=max(lengths), **form,
        )  # fmt: skip
    assert last_kernel() == DOCUMENT_SDPA
    gradient = torch.autograd.grad(out.float().square().sum(), row)[0]
    parts = zip(numbers, out[0].float().cpu().split(lengths), gradient.cpu().split(lengths, 2), strict=True)
    return {str(n): [o.flatten().tolist(), g.flatten().tolist()] for n, o, g in parts}


def test_which_attention_weights_are_dropped_depends_on_the_document_and_the_call_alone(virtual):
    alone = {**virtual(attend, numbers=[9]), **virtual(attend, numbers=[7])}
    together, others = virtual(attend, numbers=[4, 9, 2, 7]), virtual(attend, numbers=[7, 4, 9])
    for number in ("9", "7"):
        assert together[number] == others[number] == alone[number]
    # the same inputs under another seed, or another number, have other masks
    assert virtual(attend, numbers=[9], seed=4)["9"] != alone["9"]
    unknown = virtual(attend, numbers=[9, 7], known=False)  # then documents are numbered by their place
    assert unknown["9"] != alone["9"] and unknown["7"] != alone["7"]


@pytest.mark.parametrize("form", [{"sliding_window": 3}, {"softcap": 0.7}, {"sinks": True}])
def test_the_same_holds_for_what_torchs_kernel_cannot_compute(virtual, form: dict[str, Any]):
    alone, together = (virtual(attend, numbers=n, **form) for n in ([9], [4, 9, 2, 7]))
    assert together["9"] == alone["9"] != virtual(attend, numbers=[9], seed=4, **form)["9"]


def test_the_same_holds_under_autocast_and_weights_are_dropped_at_their_rate(virtual):
    alone, together = (virtual(attend, numbers=n, autocast=True) for n in ([9], [4, 9]))
    assert together["9"] == alone["9"]
    assert any(value == 0.0 for value in alone["9"][0])  # the first token sees itself alone, and may be dropped whole


@pytest.mark.parametrize("kind", ["bert", pytest.param("distilbert", marks=pytest.mark.slow)])
def test_a_classifier_that_drops_attention_weights_trains_document_by_document(virtual, tmp_path, kind: str):
    case = {"kind": kind, "attention_dropout": 0.1}
    found = virtual(outcome, folder=str(tmp_path / "one"), **case)
    assert found["environment"]["in_effect"]["attention_kernel"] == DOCUMENT_SDPA
    assert found["environment"]["isolation"]["leak"] == 0.0
    assert sum(found["counts"]["waits"].values()) <= 3, found["counts"]["waits"]
    # another microbatch, and so other neighbours: the masks do not show it
    other = virtual(outcome, folder=str(tmp_path / "other"), **case, microbatch_tokens=64)
    assert other["microbatches"] > found["microbatches"]
    assert close(other["losses"], found["losses"], 1e-6) and close(other["norms"], found["norms"], 1e-5)


# ---- the same bits ----


def resumed(folder: str, **case: Any) -> dict[str, Any]:
    """A run of four steps, and the same run killed after the checkpoint of its second: their lines and weights."""
    often: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = make(Path(folder) / "whole", **case, **often)
    whole.train()
    again = Path(folder) / "again"
    shutil.copytree(whole.run.path, again / "run")
    shutil.rmtree(again / "run/checkpoints/step-00000004")
    torch.rand(7, device="cuda")  # no state of a generator is carried on
    second = make(again, **case, **often, models=whole.run.path.parent)
    second.train()
    weights = [
        {name: p.detach().double().sum().item() for name, p in built.model.named_parameters() if p.requires_grad}
        for built in (whole, second)
    ]
    keys = ("step", "loss", "grad_norm", "eval_loss")
    lines = [[[line.get(key) for key in keys] for line in built.lines] for built in (whole, second)]
    moments = [
        {str(state["exp_avg"].device) for state in built.trainer.optimizer.optimizer.state.values()}
        for built in (whole, second)
    ]
    return {
        "lines": lines,
        "weights": weights,
        "moments": [sorted(devices) for devices in moments],
        "resumed": second.trainer.checkpointer.resumption is not None,
    }


@pytest.mark.parametrize("tune", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_a_run_goes_on_from_its_checkpoint_with_the_same_bits(virtual, tmp_path, tune: str):
    found = virtual(resumed, folder=str(tmp_path), kind="opt", precision="bf16", tune=tune)
    assert found["resumed"] and len(found["lines"][0]) == 6  # with two evaluations
    assert found["lines"][0] == found["lines"][1] and found["weights"][0] == found["weights"][1]
    assert found["moments"] == [["cuda:0"], ["cuda:0"]]


def kernels_of(folder: str, **case: Any) -> dict[str, Any]:
    found = outcome(folder, **case)
    return {
        "backward": found["deterministic"],
        "record": found["environment"]["in_effect"]["deterministic"],
        "workspace": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
        "note": [line for line in found["printed"].splitlines() if "deterministic" in line],
    }


@pytest.mark.parametrize(
    ("tune", "values", "promised_by"),
    [
        ("full", {}, "resume"),
        ("lora", {"resume": "never"}, "exact_gradients"),
        ("full", {"resume": "never"}, None),
    ],
)
def test_kernels_are_deterministic_where_bits_are_promised_and_say_so(virtual, tmp_path, tune, values, promised_by):
    case = {"kind": "opt", "precision": "bf16", "tune": tune, "max_steps": 2, **values}
    found = virtual(kernels_of, folder=str(tmp_path), **case)
    assert found["backward"] is found["record"] is (promised_by is not None)
    assert found["workspace"] == (":4096:8" if promised_by else None)
    assert len(found["note"]) == (1 if promised_by else 0)
    assert not promised_by or f"{promised_by} promises the same bits" in found["note"][0]


# ---- one GPU a process, and its memory ----


def on_a_host_of_two(folder: str) -> dict[str, Any]:
    count, torch.cuda.device_count = torch.cuda.device_count, lambda: 2
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            built = make(Path(folder), kind="opt", max_steps=2)
            built.train()
    finally:
        torch.cuda.device_count = count
    record = json.loads((built.run.path / "environment.json").read_text())
    return {"engine": record["in_effect"]["engine"], "n_gpu": built.trainer.args.n_gpu, "steps": len(built.steps)}


def test_a_plain_process_uses_one_gpu_of_two(virtual, tmp_path):
    found = virtual(on_a_host_of_two, folder=str(tmp_path))
    assert found == {"engine": "OPTForCausalLM", "n_gpu": 1, "steps": 2}


def wrapped_by_force(folder: str) -> str:
    count, torch.cuda.device_count = torch.cuda.device_count, lambda: 2
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            built = make(Path(folder), kind="opt", max_steps=2)
            built.trainer.args._n_gpu = 2
            built.train()
    except RunFault as fault:
        return str(fault)
    finally:
        torch.cuda.device_count = count
    return ""


def test_a_model_in_data_parallel_is_refused_before_its_first_step(virtual, tmp_path):
    said = virtual(wrapped_by_force, folder=str(tmp_path))
    assert said == "engine is DataParallel after preparation, and plain was asked; nothing was trained"


def peaks(folder: str) -> list[list[int]]:
    def self_test(*given: Any, **more: Any) -> Any:
        torch.ones(2**26, device="cuda")  # 256 MiB that are gone before training begins
        return check_isolation(*given, **more)

    torch.ones(2**26, device="cuda")
    before = torch.cuda.max_memory_allocated()
    with mock.patch.object(callbacks, "check_isolation", self_test):
        lines = outcome(folder, kind="opt", max_steps=2)["lines"]
    return [[before, line["peak_memory_bytes"], line["peak_reserved_bytes"]] for line in lines if "loss" in line]


def test_the_peak_of_memory_is_that_of_training_and_reserved_memory_stands_beside_it(virtual, tmp_path):
    for before, allocated, reserved in virtual(peaks, folder=str(tmp_path)):
        assert before >= 2**28 > allocated > 0 and reserved >= allocated
