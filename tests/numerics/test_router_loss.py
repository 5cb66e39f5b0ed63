"""The routers' balancing loss over a global batch: transformers' own loss of one forward over all its documents."""

from typing import Any

import pytest
import torch
from tests.building import Built, build, each_document, small_experts
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from isotune.io.errors import UserError
from isotune.models.causal import install_causal
from isotune.training.router_balance import RouterBalance

COEFFICIENT = 0.5  # a balance that counts for something
KINDS = ("mixtral", "qwen3_moe", "olmoe", "gpt_oss")


def one_forward(built: Built) -> tuple[float, float, dict[str, torch.Tensor]]:
    """Loss, balancing loss and gradients of the first step: the stock model, every document a line of one batch."""
    model = AutoModelForCausalLM.from_pretrained(built.recipe.model_name_or_path, attn_implementation="eager")
    step = built.trainer.plan.schedule.step(0)
    wanted = sorted({document for microbatch in step.microbatches for document in microbatch.documents})
    documents = [list(each_document(built.trainer.plan.documents.documents))[number] for number in wanted]
    lines = nn.utils.rnn.pad_sequence([ids for ids, _ in documents], batch_first=True, padding_value=1)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(ids) for ids, _ in documents], batch_first=True)
    outputs = model(input_ids=lines, attention_mask=mask, output_router_logits=True)
    loss = sum(
        cross_entropy(logits[: len(ids) - 1][supervised[1:]], ids[1:][supervised[1:]], reduction="sum")
        for logits, (ids, supervised) in zip(outputs.logits, documents, strict=True)
    ) / sum(int(supervised.sum()) for _, supervised in documents)
    total = loss + COEFFICIENT * outputs.aux_loss
    total.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return float(total.detach()), float(outputs.aux_loss.detach()), found


@pytest.mark.parametrize("tokens", [256, 700])
@pytest.mark.parametrize("exact", [True, False], ids=["exact_gradients", "float_sums"])
def test_loss_and_gradients_are_those_of_one_stock_forward_over_the_global_batch(tmp_path, capsys, tokens, exact):
    values = {"model_name_or_path": small_experts(tmp_path / "model"), "router_aux_loss_coef": COEFFICIENT}
    built = build(tmp_path, **values, microbatch_tokens=tokens, exact_gradients=exact)
    assert "is not trained" not in capsys.readouterr().out
    assert len(built.trainer.plan.schedule.step(0).microbatches) >= 2
    total, balance, expected = one_forward(built)
    loss = built.trainer.training_step(built.model, next(iter(built.trainer.get_train_dataloader())))
    assert loss.item() == pytest.approx(total, rel=1e-5)
    assert built.trainer.plan.task.train_metrics(None, 0) == {"router_loss": pytest.approx(balance, rel=1e-5)}
    for name, parameter in built.model.named_parameters():
        assert (parameter.grad - expected[name]).norm() <= 1e-5 * expected[name].norm(), name
    routers = [name for name in expected if "gate." in name or "router." in name]
    assert routers, "the test has to see a router"


def test_a_mean_of_the_microbatches_losses_would_be_another_number(tmp_path):
    """What the test above would not notice if routers balanced every microbatch by itself."""
    balance = RouterBalance(2, 1)
    halves = [torch.tensor([[5.0, 0.0]] * 4), torch.tensor([[0.0, 5.0]] * 4)]
    alone = sum(float(balance.of_forward((half,))) for half in halves) / 2
    together = float(balance.of_forward((torch.cat(halves),)))
    assert alone > 1.9 and together == pytest.approx(1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_every_type_is_held_to_the_loss_of_its_own_forward(tmp_path, kind):
    model = AutoModelForCausalLM.from_pretrained(small_experts(tmp_path, kind))
    install_causal(model, 64)
    found = RouterBalance.of(model)
    assert (found.experts, found.chosen) == (4, 2)


def test_what_cannot_be_balanced_is_refused(tmp_path):
    with pytest.raises(UserError, match="model type 'opt' has no balancing loss"):
        build(tmp_path / "opt", router_aux_loss_coef=0.1)
    model = AutoModelForCausalLM.from_pretrained(small_experts(tmp_path / "model"))
    install_causal(model, 64)
    model.num_experts_per_tok = 1  # its own forward now counts one expert a token
    assert RouterBalance.of(model).chosen == 1
    stock = model.stock_forward

    def other(*args: Any, **kwargs: Any) -> Any:
        outputs = stock(*args, **kwargs)
        outputs.aux_loss = 2 * outputs.aux_loss
        return outputs

    model.stock_forward = other
    with pytest.raises(UserError, match="model type 'mixtral' balances its routers in its own way"):
        RouterBalance.of(model)


def test_without_the_key_nothing_is_balanced_and_a_line_says_so(tmp_path, capsys):
    built = build(tmp_path, model_name_or_path=small_experts(tmp_path / "model"))
    assert "(router_aux_loss_coef) is not trained" in capsys.readouterr().out
    assert built.trainer.plan.task.router_loss is None
    assert "router_loss" not in built.train()[0]


def test_a_look_ahead_that_runs_out_of_memory_makes_microbatches_smaller(tmp_path, capsys):
    values = {"model_name_or_path": small_experts(tmp_path / "model"), "router_aux_loss_coef": COEFFICIENT}
    losses, refused = [], []
    for tokens in (256, 512):
        built = build(tmp_path / str(tokens), **values, chosen_tokens=tokens)

        def look(module: Any, inputs: Any, output: torch.Tensor) -> None:
            if not torch.is_grad_enabled() and output.shape[-2] > 256:
                refused.append(output.shape[-2])
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        built.model.get_submodule("model.embed_tokens").register_forward_hook(look)
        built.trainer.update.sync.prepare(built.model)
        step = next(iter(built.trainer.get_train_dataloader()))
        losses.append(built.trainer.training_step(built.model, step).item())
    assert len(refused) == 1 and built.trainer.memory.retries == 1 and built.trainer.memory.tokens == 256
    assert losses[0] == losses[1]
