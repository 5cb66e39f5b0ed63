"""bf16 and fp16 under every engine: 16 bits are for products, not for losses, sums of gradients or trained weights.

`pytest tests/distributed/test_engine_precision.py -m slow -s` prints how far bf16 is from bf16 in one plain process.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.distributed.engines import PLAIN, Engine, config_of, deviation, engine, recipes, saved
from tests.launching import TINY, Finished, start, start_together

LOSS = 1e-3  # relative, of any step and of the evaluation
ROWS = 8  # of a step: as many microbatches
ON_CPU_IN_FP16 = ("DDP on 2", "FSDP2 on 2")  # DeepSpeed's needs a GPU
NAMES = ("DDP on 2", "ZeRO-1 on 2", "ZeRO-2 on 2", "ZeRO-3 on 2", "ZeRO-3 + offload on 2", "FSDP2 on 2")
ONE_LAUNCH = [
    pytest.param(name, precision, marks=[] if (name, precision) == ("FSDP2 on 2", "bf16") else pytest.mark.slow)
    for precision, names in (("bf16", NAMES), ("fp16", ON_CPU_IN_FP16))
    for name in names
]
COUNTED = {"script": "tests/distributed/counted_gradients.py"}
PRECISIONS = ("precision", "accumulation_dtype", "reduction_dtype", "output_dtype")


def effective(finished: Finished) -> tuple:
    return tuple(finished.environment["in_effect"][key] for key in PRECISIONS)


def fits(number: float, precision: str) -> bool:
    """Whether 16 bits hold the number, but for the rounding of fp32."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return number == pytest.approx(torch.tensor(number).to(dtype).item(), rel=1e-7)


def launch(folder: Path, one: Engine, runs: dict[str, dict], **more) -> dict[str, Finished]:
    return start_together(folder, runs, processes=one.processes, config=config_of(one, folder.parent), **more)


@pytest.mark.parametrize(("name", "precision"), ONE_LAUNCH)
def test_losses_and_sums_of_gradients_are_fp32(tmp_path: Path, name, precision):
    recipe = TINY | {precision: True, "save_strategy": "no", "max_steps": 2, "global_batch_size": ROWS}
    runs = {"many": recipe, "one": recipe | {"global_batch_size": 1, "max_steps": 4}}
    done = launch(tmp_path / "runs", engine(name), runs, **COUNTED)
    # of two ranks with four microbatches each; beyond the large one 16 bits hold every second number
    large, loss_scale = {"bf16": (256, 1.0), "fp16": (2048, 2.0**16)}[precision]
    assert [step["grad_norm"] * loss_scale for step in done["many"].steps] == [large + ROWS - 1] * 2
    # one microbatch a step: the loss of the step is the sum that the engine returned
    losses = [step["loss"] for step in done["one"].steps]
    assert len(losses) == 4 and not all(fits(loss, precision) for loss in losses), losses
    for finished in done.values():
        assert effective(finished) == (precision, "float32", "float32", None)
        assert "note        gradients" not in finished.stdout


@pytest.mark.slow
def test_sums_in_16_bits_that_a_file_asks_for_are_told(tmp_path: Path):
    one = engine("ZeRO-0 on 2")
    done = launch(tmp_path / "run", one, {"full": TINY | {"bf16": True, "save_strategy": "no"}})["full"]
    assert effective(done) == ("bf16", "bfloat16", "float32", None), "DeepSpeed without ZeRO cannot do otherwise"
    assert "note        gradients of microbatches add up in bfloat16 under DeepSpeedEngine, ZeRO-0" in done.stdout
    assert "note        ZeRO-0 in bf16 keeps no weights in fp32" in done.stdout


@pytest.mark.slow
def test_accelerates_own_precision_of_fsdp2_trains_nothing(tmp_path: Path):
    recipe = TINY | {"bf16": True, "save_strategy": "no"}
    more = {"environment": {"PYTHONPATH": ".", "STOCK_POLICY": "1"}, "processes": 2, "config": "fsdp2.yaml"}
    done = start(tmp_path, recipe, expect=1, **more, **COUNTED)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "gradients of microbatches add up in is bfloat16 after preparation" in errors[0]
    assert not (done.run / "metrics.jsonl").exists()


@pytest.fixture(scope="module")
def matrix(tmp_path_factory) -> tuple[Path, dict[str, dict[str, Finished]]]:
    """The base model, and runs of every engine: full and LoRA in bf16, one that moves no weight, and one in fp16."""
    folder = tmp_path_factory.mktemp("bf16")
    runs = {tune: recipe for tune, recipe in recipes(folder, bf16=True).items() if tune != "qlora"}
    runs["still"] = runs["full"] | {"learning_rate": 0.0, "max_steps": 1}
    done = {}
    for one in (PLAIN, *map(engine, NAMES)):
        fp16 = {} if one.kind == "DeepSpeed" else {"fp16": runs["full"] | {"bf16": False, "fp16": True}}
        done[one.name] = launch(folder / one.name.replace(" ", "_"), one, runs | fp16)
    return folder / "opt", done


@pytest.mark.slow
@pytest.mark.parametrize(("run", "names"), [("full", NAMES), ("lora", NAMES), ("fp16", ON_CPU_IN_FP16)])
def test_16_bits_under_an_engine_are_those_of_one_plain_process(matrix, run, names):
    base, done = matrix
    rows = {name: deviation(done[PLAIN.name][run], done[name][run], base) for name in names}
    for name, apart in rows.items():
        print(f"| {name}, {run} | {apart.loss:.1e} | {apart.eval_loss:.1e} | {apart.norm:.1e} |")
    assert all(apart.loss <= LOSS and apart.eval_loss <= LOSS for apart in rows.values()), rows


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_weights_that_training_does_not_move_keep_every_bit(matrix, name):
    base, done = matrix
    before, after = load_file(base / "model.safetensors"), saved(done[name]["still"])
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in before.values())
    for key, tensor in after.items():
        assert torch.equal(tensor, before[key]), key
