"""The mixin over both libraries' trainers, and its parts without a trainer."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from tests.building import build, each_document, loss_of_document, small_opt
from tests.launching import TINY
from torch import nn
from transformers import AutoModelForSequenceClassification, BertConfig, OPTConfig, OPTForCausalLM, XLNetConfig

from isotune.config import Recipe
from isotune.data.sft.preparation import prepare_conversations
from isotune.distributed.watchdog import Watchdog
from isotune.io.errors import RunFault, UserError
from isotune.models.causal import install_causal
from isotune.models.class_loss import ClassLoss
from isotune.models.classifier import install_classification
from isotune.models.packed_attention import PACKED
from isotune.training.arguments import sft_arguments, training_arguments
from isotune.training.failures.nonfinite import NonFinitePolicy
from isotune.training.from_recipe import build_model, make_plan, start_run
from isotune.training.gradients.gradient_gaps import leaves_gaps, refuse_left_out_layers
from isotune.training.gradients.gradient_sync import GradientSync
from isotune.training.tasks import SftTask
from isotune.training.trainer import SFTTrainer, Trainer
from isotune.training.training_plan import StepLoader
from isotune.training.update import OptimizerUpdate

SMALL: dict[str, Any] = {"vocab_size": 40, "hidden_size": 16, "num_attention_heads": 2, "pad_token_id": 1}


def parts(folder: Path, **values: Any) -> tuple[Recipe, Any, Any, nn.Module, Any]:
    """Recipe, process, plan, model and tokenizer of a tiny run, without a trainer."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    recipe = Recipe.from_values(**{**TINY, "output_dir": str(folder / "run"), **values})
    start = start_run(recipe)
    data = prepare_conversations(recipe, start.tokenizer, show=False)
    plan, model = make_plan(recipe, start.process, data, SftTask()), build_model(start, data)
    return recipe, start.process, plan, model, start.tokenizer


@pytest.mark.parametrize("kind", ["Trainer", "SFTTrainer"])
def test_without_recorder_and_checkpointer_a_notebook_trains_to_the_bits_of_the_script(tmp_path, kind) -> None:
    model_folder = small_opt(tmp_path / "opt", dropout=0.1)
    values = {"model_name_or_path": model_folder, "max_steps": 3}
    recipe, process, plan, model, tokenizer = parts(tmp_path / "notebook", **values)
    make, arguments = (Trainer, training_arguments) if kind == "Trainer" else (SFTTrainer, sft_arguments)
    trainer = make(plan=plan, model=model, args=arguments(recipe, process), processing_class=tokenizer)
    trainer.train()
    assert trainer.state.global_step == 3
    assert not (tmp_path / "notebook" / "run" / "metrics.jsonl").exists()

    script = build(tmp_path / "script", **values)
    script.train()
    wanted = script.model.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.state_dict().items())


def test_one_update_without_a_trainer_has_the_gradient_of_a_naive_loop(tmp_path) -> None:
    folder = small_opt(tmp_path / "opt")
    _, _, plan, model, _ = parts(tmp_path, model_name_or_path=folder)
    watchdog = Watchdog(60.0)
    update = OptimizerUpdate(SftTask(), GradientSync(Accelerator(cpu=True)), NonFinitePolicy(), watchdog, seed=1)
    item = next(iter(StepLoader(plan.schedule, plan.documents.documents, 0, 1)))
    result = update.run(model, item["step"], item["microbatches"])

    plain = OPTForCausalLM.from_pretrained(folder, attn_implementation="eager").train()
    documents = list(each_document(plan.documents.documents))
    wanted = [document for microbatch in item["step"].microbatches for document in microbatch.documents]
    loss = sum(loss_of_document(plain, *documents[number]) for number in wanted) / item["step"].supervised_tokens
    loss.backward()
    assert result.loss == pytest.approx(loss.item(), rel=1e-6)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    norm = torch.stack([p.grad.norm() for p in plain.parameters() if p.grad is not None]).norm()
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None:
            assert (found[name] - parameter.grad).norm() <= 1e-5 * norm, name
    assert update.clip(model, 0.0) == pytest.approx(norm.item(), rel=1e-5)
    assert update.clip(model, norm.item() / 2) == pytest.approx(norm.item(), rel=1e-5)
    clipped = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    assert clipped.item() == pytest.approx(norm.item() / 2, rel=1e-4)


@pytest.mark.parametrize("action", ["stop", "skip"])
def test_a_loss_that_is_nan_stops_or_skips_without_a_trainer(tmp_path, action) -> None:
    _, _, plan, model, _ = parts(tmp_path, model_name_or_path=small_opt(tmp_path / "opt"))
    policy = NonFinitePolicy(
        action,
        advice="; on_nonfinite: skip would leave such updates out",
        name_rows=lambda step, number: f"rows of {number}",
    )
    update = OptimizerUpdate(SftTask(), GradientSync(Accelerator(cpu=True)), policy, Watchdog(60.0), seed=1)
    item = next(iter(StepLoader(plan.schedule, plan.documents.documents, 0, 1)))
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    if action == "stop":
        with pytest.raises(RunFault, match="the loss of step 1, microbatch 0, documents of rows of 0 is not finite"):
            update.run(model, item["step"], item["microbatches"])
    else:
        result = update.run(model, item["step"], item["microbatches"])
        assert result.skipped and policy.skipped_steps == 1


@pytest.mark.parametrize("exact", [True, False])
def test_the_order_of_a_steps_microbatches_changes_nothing(tmp_path, exact) -> None:
    folder, found = small_opt(tmp_path / "opt", dropout=0.1, attention_dropout=0.1, layerdrop=0.2), []
    for turn in (1, -1):
        _, _, plan, model, _ = parts(tmp_path / str(turn), model_name_or_path=folder)
        sync = GradientSync(Accelerator(cpu=True), exact=exact)
        sync.prepare(model)
        update = OptimizerUpdate(SftTask(), sync, NonFinitePolicy(), Watchdog(60.0), seed=1)
        item = next(iter(StepLoader(plan.schedule, plan.documents.documents, 0, 1)))
        assert len(item["microbatches"]) > 2
        result = update.run(model, item["step"], item["microbatches"][::turn])
        found.append((result.loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (loss, gradients), (other_loss, others) = found
    assert other_loss == loss, "losses are summed in the order of their numbers"
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    for name, gradient in gradients.items():
        assert (others[name] - gradient).norm() <= (0 if exact else 1e-6 * norm), name


def test_a_layer_that_is_left_out_has_no_gradient_exact_or_not(tmp_path) -> None:
    without: list[list[str]] = []
    _, _, plan, model, _ = parts(tmp_path, model_name_or_path=small_opt(tmp_path / "opt", layerdrop=0.5))
    for exact in (False, True):
        sync = GradientSync(Accelerator(cpu=True), exact=exact)
        sync.prepare(model)
        update = OptimizerUpdate(SftTask(), sync, NonFinitePolicy(), Watchdog(60.0), seed=1)
        for item, _ in zip(StepLoader(plan.schedule, plan.documents.documents, 0, 1), range(3), strict=False):
            update.run(model, item["step"], item["microbatches"])
            without.append([name for name, p in model.named_parameters() if p.grad is None])
            update.sync.drop(model)
    assert any(without) and without[:3] == without[3:]


def test_zero_refuses_layers_that_are_left_out(tmp_path) -> None:
    refuse_left_out_layers(OPTForCausalLM.from_pretrained(small_opt(tmp_path / "none")))
    model = OPTForCausalLM.from_pretrained(small_opt(tmp_path / "some", layerdrop=0.1))
    with pytest.raises(UserError, match=r"^layerdrop: DeepSpeed gives a layer"):
        refuse_left_out_layers(model)


@pytest.mark.parametrize(
    ("config", "gaps"),
    [
        (BertConfig(num_hidden_layers=1, **SMALL), False),
        (XLNetConfig(n_layer=1, d_model=16, n_head=2, d_inner=16), True),
        (OPTConfig(num_hidden_layers=1, ffn_dim=16, word_embed_proj_dim=16, dropout=0.1, **SMALL), False),
        (OPTConfig(num_hidden_layers=1, ffn_dim=16, word_embed_proj_dim=16, layerdrop=0.1, **SMALL), True),
    ],
)
def test_a_parameter_that_no_microbatch_uses_is_found_before_training(config, gaps) -> None:
    if isinstance(config, OPTConfig):
        model: Any = OPTForCausalLM(config)
        install_causal(model, 64)
        task = SimpleNamespace(pads=False, item="rows")
    else:
        model = AutoModelForSequenceClassification.from_config(config)
        layout = install_classification(model, ClassLoss(None, 0.0), 64)
        task = SimpleNamespace(pads=layout.name != PACKED, item="documents")
    before = [p.clone() for p in model.parameters()]
    assert leaves_gaps(model, task, torch.device("cpu")) is gaps
    after = list(model.parameters())
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, after, strict=True))
