"""A loss or a gradient that is no number: the run stops and names the place, or leaves the update out and goes on."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.building import Built, build, small_opt
from tests.launching import TINY, start
from transformers import TrainerCallback

from isotune.io.errors import RunFault
from isotune.models.base.builtin import builtin_tokenizer
from isotune.run.malloc_tuning import malloc_tunables

BAD_ROW = 7
ANSWERS = ["Qatar" if row == BAD_ROW else f"word {row}" for row in range(12)]


def rare_token() -> int:
    """A token that the answer of the bad row has and no other answer."""
    tokens = [set(builtin_tokenizer("builtin:opt-tiny")(f"I say {answer} to you.")["input_ids"]) for answer in ANSWERS]
    return min(tokens[BAD_ROW].difference(*(tokens[row] for row in range(12) if row != BAD_ROW)))


def corpus(folder: Path) -> str:
    """Twelve short conversations; the answer of row 7 alone holds a token that no other row has."""
    file = folder / "rows.jsonl"
    texts = [f"### Human: Say it.\n### Assistant: I say {answer} to you." for answer in ANSWERS]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(file)


def model_broken_at_the_bad_word(folder: Path, value: float) -> str:
    """A saved OPT whose embedding of the rare token is `value`: only documents that hold it are affected."""
    model = small_opt(folder / "opt", tie_word_embeddings=False)  # tied, the broken row would break every softmax
    file = Path(model) / "model.safetensors"
    tensors = load_file(file)
    (name,) = [name for name in tensors if name.endswith("embed_tokens.weight")]
    tensors[name][rare_token()] = value
    save_file(tensors, file, metadata={"format": "pt"})
    return model


def recipe(folder: Path, value: float = math.inf, **values) -> dict:
    return {
        "model_name_or_path": model_broken_at_the_bad_word(folder, value),
        "dataset_name": corpus(folder),
        "max_seq_length": 64,
        "packing": False,
        "global_batch_size": 4,
        "microbatch_tokens": 80,
        "max_steps": 3,
        **values,
    }


def broken_place(built: Built) -> tuple[int, int, list[int]]:
    """Step (from 1), microbatch and rows of the one pass of the first epoch that sees the bad row."""
    documents = built.trainer.plan.documents.documents.source_rows
    for number in range(built.trainer.plan.schedule.steps_per_epoch):
        for microbatch in built.trainer.plan.schedule.step(number).microbatches:
            rows = [int(documents[d]) for d in microbatch.documents]
            if BAD_ROW in rows:
                return number + 1, microbatch.number, rows
    raise AssertionError("the bad row is in every epoch")


class WeightsAfterEachStep(TrainerCallback):
    """Keeps a copy of the weights as they are after each update."""

    def __init__(self, model: torch.nn.Module, copies: list[dict[str, torch.Tensor]]) -> None:
        self.model, self.copies = model, copies

    def on_step_end(self, *_, **__) -> None:
        """Called by Trainer."""
        self.copies.append(copy_of_weights(self.model))


def copy_of_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_only_one_update_changed_nothing(weights: list[dict[str, torch.Tensor]], step: int) -> None:
    for number, (before, after) in enumerate(itertools.pairwise(weights), start=1):
        same = {name for name in before if torch.equal(before[name].nan_to_num(), after[name].nan_to_num())}
        assert (same == before.keys()) is (number == step), number


def overflow_backward_of_the_bad_word(built: Built) -> None:
    """Where the rare token passes, the gradient of its embedding is multiplied beyond every number."""
    token = rare_token()

    def watch(module, inputs, output: torch.Tensor) -> None:
        if output.requires_grad and bool((inputs[0] == token).any()):
            output.register_hook(lambda gradient: gradient * math.inf)

    built.model.get_input_embeddings().register_forward_hook(watch)


@pytest.mark.parametrize("exact", [True, False], ids=["exact_gradients", "float_sums"])
def test_a_loss_that_is_no_number_stops_the_run_and_names_step_microbatch_and_rows(tmp_path, exact):
    built = build(tmp_path, **recipe(tmp_path, exact_gradients=exact))
    step, microbatch, rows = broken_place(built)
    with pytest.raises(RunFault) as stopped:
        built.trainer.train()
    said = str(stopped.value)
    listed = ", ".join(map(str, rows))
    assert said.startswith(f"the loss of step {step}, microbatch {microbatch}, documents of rows {listed} of ")
    assert "rows.jsonl" in said and "on_nonfinite: skip" in said
    assert [line["step"] for line in built.lines] == list(range(1, step)), "what was done before is kept"


@pytest.mark.parametrize("exact", [True, False], ids=["exact_gradients", "float_sums"])
def test_skip_leaves_that_update_out_and_goes_on_with_finite_weights(tmp_path, capsys, exact):
    built = build(tmp_path, **recipe(tmp_path, exact_gradients=exact, on_nonfinite="skip"))
    step, microbatch, _ = broken_place(built)
    before = copy_of_weights(built.model)
    seen = [before]
    built.trainer.add_callback(WeightsAfterEachStep(built.model, seen))
    lines = built.train()
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[-1]["skipped_steps"] == 1
    assert lines[step - 1]["loss"] is None and lines[step - 1]["grad_norm"] is None
    assert all(line["loss"] is not None for line in lines if line["step"] != step)
    for name, parameter in built.model.named_parameters():
        assert torch.equal(parameter.isfinite(), before[name].isfinite()), "only what was broken from the start is"
    assert_only_one_update_changed_nothing(seen, step)
    assert f"skipped: the loss of step {step}, microbatch {microbatch}," in capsys.readouterr().err


def test_a_gradient_that_is_no_number_under_a_finite_loss_names_its_microbatch_too(tmp_path):
    built = build(tmp_path, **recipe(tmp_path, value=0.0))
    step, microbatch, rows = broken_place(built)
    overflow_backward_of_the_bad_word(built)
    with pytest.raises(RunFault) as stopped:
        built.trainer.train()
    listed = ", ".join(map(str, rows))
    place = f"step {step}, microbatch {microbatch}, documents of rows {listed} of "
    assert str(stopped.value).startswith(f"the gradient of {place}")


@pytest.mark.parametrize("exact", [True, False], ids=["exact_gradients", "float_sums"])
def test_such_a_gradient_is_skipped_as_a_whole_update(tmp_path, exact):
    built = build(tmp_path, **recipe(tmp_path, value=0.0, exact_gradients=exact, on_nonfinite="skip"))
    step, _, _ = broken_place(built)
    overflow_backward_of_the_bad_word(built)
    seen = [copy_of_weights(built.model)]
    built.trainer.add_callback(WeightsAfterEachStep(built.model, seen))
    lines = built.train()
    assert lines[-1]["skipped_steps"] == 1
    assert lines[step - 1]["grad_norm"] is None and lines[step - 1]["loss"] is not None
    assert all(line["grad_norm"] is not None for line in lines if line["step"] != step)
    assert all(p.isfinite().all() for p in built.model.parameters())
    assert_only_one_update_changed_nothing(seen, step)


@pytest.mark.parametrize(
    "exact", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["exact_gradients", "float_sums"]
)
def test_two_processes_stop_together_with_one_sentence(tmp_path, exact):
    values = recipe(tmp_path, exact_gradients=exact)
    step, microbatch, rows = broken_place(build(tmp_path / "plan", **values))
    done = start(tmp_path, {**TINY, **values}, processes=2, expect=1)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    listed = ", ".join(map(str, rows))
    assert f"the loss of step {step}, microbatch {microbatch}, documents of rows {listed} of " in errors[0]
    assert not (done.run / "model").exists()


def test_two_processes_skip_together_and_end_as_one_does(tmp_path):
    values = recipe(tmp_path, exact_gradients=True, on_nonfinite="skip", sample_prompt="")
    one = build(tmp_path / "one", **values).train()
    two = start(tmp_path, {**TINY, **values}, processes=2)
    assert [(x["loss"], x["grad_norm"]) for x in two.steps] == [(x["loss"], x["grad_norm"]) for x in one]
    assert two.steps[-1]["skipped_steps"] == 1
    assert two.environment["heap_settings"] == malloc_tunables({})  # as under plain python


def test_fp16s_scaling_is_not_blamed_for_ever(tmp_path):
    built = build(tmp_path, **recipe(tmp_path, value=0.0, fp16=True, global_batch_size=12, max_steps=6))
    built.trainer.accelerator.scaler = torch.amp.GradScaler(built.trainer.args.device.type, init_scale=4.0)
    overflow_backward_of_the_bad_word(built)
    with pytest.raises(RunFault, match=r"the gradient of step 3, microbatch \d+, documents of rows .*7"):
        built.trainer.train()
    assert [line["skipped_steps"] for line in built.lines] == [1, 2], "at scales 4 and 2 it might have been an overflow"
