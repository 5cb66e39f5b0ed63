"""What a recipe says about precision is what the products run in, and fp16's overflows are skipped and counted."""

import json
from pathlib import Path

import pytest
import torch
from tests.building import Built, build, small_opt

from isotune.io.errors import RunFault

MEAN_LOSS_TOLERANCE = {"bf16": 0.02, "fp16": 0.005}
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def watch_products(built: Built) -> set[tuple[str, torch.dtype]]:
    """The types of the linear layers' results in training, gathered while it runs."""
    seen: set[tuple[str, torch.dtype]] = set()
    for name, module in built.model.named_modules():
        if name.endswith(("fc1", "q_proj")):
            module.register_forward_hook(lambda module, inputs, output: seen.add((type(module).__name__, output.dtype)))
    return seen


def record(built: Built) -> dict:
    return json.loads((built.run.path / "environment.json").read_text())["in_effect"]


def fine_tune(folder: Path, max_steps: int = 5, **values) -> Built:
    return build(folder, model_name_or_path=small_opt(folder / "opt"), max_steps=max_steps, **values)


@pytest.mark.parametrize(
    ("precision", "tune"),
    [
        ("bf16", "lora"),
        ("fp16", "full"),
        pytest.param("bf16", "full", marks=pytest.mark.slow),
        pytest.param("fp16", "lora", marks=pytest.mark.slow),
    ],
)
def test_half_precision_is_really_computed_and_stays_close_to_fp32(tmp_path, precision, tune):
    reference = fine_tune(tmp_path / "fp32", tune=tune)
    expected = [line["loss"] for line in reference.train()]
    built = fine_tune(tmp_path / precision, tune=tune, **{precision: True})
    products = watch_products(built)
    steps = built.train()
    assert {dtype for _, dtype in products} == {TYPES[precision]}
    assert record(built)["precision"] == precision
    assert record(built)["weights_dtype"] == ("float32" if tune == "full" else str(TYPES[precision]).split(".")[1])
    assert all(p.dtype == torch.float32 for p in built.model.parameters() if p.requires_grad), (
        "trained weights are fp32"
    )
    assert (built.trainer.accelerator.scaler is not None) is (precision == "fp16")
    skipped = steps[-1].get("skipped_steps", 0)
    assert skipped <= 2
    # an update that fp16 skipped is one that it lags behind
    for number, line in enumerate(steps):
        behind = expected[max(0, number - skipped)]
        allowed = MEAN_LOSS_TOLERANCE[precision] * expected[number]
        assert min(expected[number], behind) - allowed <= line["loss"] <= max(expected[number], behind) + allowed


def test_without_half_precision_everything_is_fp32(tmp_path):
    built = fine_tune(tmp_path)
    products = watch_products(built)
    built.train()
    assert {dtype for _, dtype in products} == {torch.float32}
    assert record(built)["precision"] == "no"
    assert built.trainer.accelerator.scaler is None


@pytest.mark.parametrize(
    "exact", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["exact_gradients", "float_sums"]
)
def test_an_fp16_overflow_is_skipped_and_counted_and_the_schedule_waits(tmp_path, exact):
    # a step holds the whole epoch, so that losses of different steps can be compared
    built = fine_tune(tmp_path, fp16=True, exact_gradients=exact, global_batch_size=80, max_steps=8)
    # scaled by this, every gradient overflows; each skipped step halves it
    too_large = 2.0**25
    built.trainer.accelerator.scaler = built.trainer.accelerator.scaler.__class__(
        built.trainer.args.device.type, init_scale=too_large, growth_interval=10**6
    )
    steps = built.train()
    counts = [line["skipped_steps"] for line in steps]
    overflows = counts[-1]
    assert 1 <= overflows < len(steps)
    assert counts == [min(n, overflows) for n in range(1, len(steps) + 1)], "the first steps, one after the other"
    assert built.trainer.accelerator.scaler.get_scale() == too_large / 2**overflows
    rates = [line["learning_rate"] for line in steps]
    assert rates[: overflows + 1] == [rates[0]] * (overflows + 1), "a step that was skipped moves no schedule"
    assert rates[overflows + 1] < rates[0]
    losses = [line["loss"] for line in steps]
    assert losses[: overflows + 1] == [losses[0]] * (overflows + 1), "nor a weight"
    assert losses[-1] < losses[0]
    assert all((line["grad_norm"] is None) is (n < overflows) for n, line in enumerate(steps))


def test_with_exact_gradients_the_loss_scale_changes_no_more_than_fp16s_rounding(tmp_path):
    figures = []
    for number, scale in enumerate((2.0**8, 2.0**6)):
        built = fine_tune(tmp_path / str(number), fp16=True, exact_gradients=True)
        scaler = built.trainer.accelerator.scaler.__class__(built.trainer.args.device.type, init_scale=scale)
        built.trainer.accelerator.scaler = scaler
        figures.append([(line["loss"], line["grad_norm"]) for line in built.train()])
    for (loss, norm), (other_loss, other_norm) in zip(*figures, strict=True):
        assert loss == pytest.approx(other_loss, rel=1e-3)
        assert norm == pytest.approx(other_norm, rel=1e-2)


def test_an_fp16_loss_that_is_no_number_is_skipped_too_and_counted_once(tmp_path):
    built = fine_tune(tmp_path, fp16=True, on_nonfinite="skip")
    # the first step overflows; at any scale, the second has a loss that is no number
    built.trainer.accelerator.scaler = torch.amp.GradScaler(built.trainer.args.device.type, init_scale=2.0**40)

    def lose_the_second_step(module, inputs, output):
        return output * float("nan") if module.training and built.trainer.state.global_step == 1 else output

    built.model.get_decoder().layers[0].fc1.register_forward_hook(lose_the_second_step)
    steps = built.train()
    assert [line["skipped_steps"] for line in steps[:3]] == [1, 2, 3], "at 2^39 the third overflows again"
    assert [line["loss"] is None for line in steps[:3]] == [False, True, False]
    assert all(p.isfinite().all() for p in built.model.parameters())


def test_a_precision_that_is_not_in_effect_refuses_to_train(tmp_path):
    built = fine_tune(tmp_path, bf16=True)
    built.trainer.accelerator.state._mixed_precision = "no"
    with pytest.raises(RunFault, match="precision is no after preparation, and bf16 was asked"):
        built.trainer.train()
    assert list(built.run.path.iterdir()) == []
