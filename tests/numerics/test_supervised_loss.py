"""The loss of supervised positions against plain logits and cross-entropy, and what it never allocates."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from isotune.io.errors import UserError
from isotune.models import supervised_loss as module
from isotune.models.causal import KNOWN
from isotune.models.packed_attention import document_position_ids, set_packed_attention
from isotune.models.supervised_loss import (
    LogitsTransform,
    forget_workspaces,
    install_supervised_loss,
    supervised_loss,
    use_stock_logits,
)

VOCABULARY = 211
LENGTHS = (40, 3, 150)


def _build(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    small = {"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCABULARY, "hidden_size": 64}
    if name == "opt":
        config: Any = OPTConfig(word_embed_proj_dim=32, ffn_dim=128, do_layer_norm_before=False, init_std=0.1, **small)
    else:
        config = LlamaConfig(intermediate_size=128, num_key_value_heads=2, initializer_range=0.1, **small)
    model = AutoModelForCausalLM.from_config(config).eval()
    install_supervised_loss(model)
    return model


def _with_lora(model: PreTrainedModel, **options: Any) -> nn.Module:
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **options))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # starts at zero, where half of the gradients would be zero too
            nn.init.normal_(parameter, std=0.1)
    return adapted


def _batch(config: Any) -> tuple[dict[str, Any], torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, VOCABULARY, (1, sum(LENGTHS)), generator=generator)
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    inputs = {"input_ids": ids, "position_ids": document_position_ids(config, bounds), "use_cache": False}
    inputs |= dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), bounds)
    inputs |= dict.fromkeys(("max_length_q", "max_length_k"), max(LENGTHS))
    supervised = torch.rand(sum(LENGTHS), generator=generator) < 0.6
    supervised[bounds[:-1].long()] = False
    places = supervised.nonzero()[:, 0]
    return inputs, places - 1, ids[0, places]


def _gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("tune", ["full", "lora"])
@pytest.mark.parametrize("name", ["opt", "llama"])
def test_loss_and_every_gradient_equal_plain_logits_and_cross_entropy(name: str, tune: str):
    """The reference is a loop over documents, stock attention, stock forward: nothing of ours is in it."""
    model: nn.Module = _build(name)
    config = model.config
    if tune == "lora":
        model = _with_lora(model)
    inputs, positions, targets = _batch(config)
    start, expected = 0, torch.zeros(())
    for length in LENGTHS:
        logits = model(input_ids=inputs["input_ids"][:, start : start + length], use_cache=False).logits[0]
        inside = (positions >= start) & (positions < start + length)
        expected = expected + cross_entropy(logits[positions[inside] - start], targets[inside], reduction="sum")
        start += length
    reference = _gradients(model, expected)
    set_packed_attention(model)
    out = model(**inputs, supervised_positions=positions, targets=targets)
    assert out.logits is None and out.loss.dtype == torch.float32
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    ours = _gradients(model, out.loss)
    assert ours.keys() == reference.keys() and len(ours) >= 8
    largest = max(gradient.abs().max() for gradient in reference.values())
    for parameter, gradient in reference.items():
        if "k_proj.bias" in parameter:  # zero on paper: a shift of all scores of a row changes no weight
            assert ours[parameter].abs().max() <= 1e-6 * largest
            continue
        assert (ours[parameter] - gradient).norm() <= 1e-5 * gradient.norm(), parameter


@pytest.mark.parametrize("kind", sorted(KNOWN))
def test_model_types_called_plain_have_nothing_between_decoder_and_head(kind: str):
    config = AutoConfig.for_model(
        kind, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=VOCABULARY, head_dim=8, pad_token_id=1, bos_token_id=2, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    head = model.get_output_embeddings()
    if head.bias is not None:
        nn.init.normal_(head.bias)
    ids = torch.randint(4, VOCABULARY, (1, 20), generator=torch.Generator().manual_seed(1))
    expected = cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="sum")
    install_supervised_loss(model)
    loss = model(input_ids=ids, supervised_positions=torch.arange(19), targets=ids[0, 1:], use_cache=False).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def _head(dtype: torch.dtype = torch.float32, positions: int = 300, bias: bool = True) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(positions, 24, generator=generator)
    weight = torch.randn(VOCABULARY, 24, generator=generator)
    offset = torch.randn(VOCABULARY, generator=generator)
    return [t.to(dtype).requires_grad_() for t in ((hidden, weight, offset) if bias else (hidden, weight))]


def _targets(positions: int = 300) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (positions,), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("positions", [1, 255, 256, 257, 1300])
def test_pieces_of_any_size_give_the_gradient_of_the_closed_form(positions: int):
    tensors, targets = _head(torch.float64, positions), _targets(positions)
    reference = cross_entropy(tensors[0] @ tensors[1].t() + tensors[2], targets, reduction="sum")
    loss = supervised_loss(*tensors, targets)
    torch.testing.assert_close(loss, reference, rtol=1e-12, atol=0)
    pairs = zip(torch.autograd.grad(3.0 * loss, tensors), torch.autograd.grad(3.0 * reference, tensors), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, LogitsTransform(1.0, None)),
        ({"logits_scaling": 8.0}, LogitsTransform(0.125)),  # Granite divides
        ({"logit_scale": 0.25}, LogitsTransform(0.25)),  # Cohere multiplies
        ({"lm_head_multiplier": 3}, LogitsTransform(3.0)),
        ({"logits_scaling": 4.0, "logit_scale": 0.5, "lm_head_multiplier": 3.0}, LogitsTransform(0.375)),
        ({"final_logit_softcapping": 30}, LogitsTransform(1.0, 30.0)),
        ({"logits_soft_cap": 20.0, "logit_scale": 2.0}, LogitsTransform(2.0, 20.0)),
        (
            {"final_logit_softcapping": None, "output_logit_soft_cap": 5.0, "logits_scaling": 0},
            LogitsTransform(1.0, 5.0),
        ),
    ],
)
def test_what_is_done_to_logits_is_read_from_every_name_of_it(keys: dict[str, Any], expected: LogitsTransform):
    found = LogitsTransform.of(PreTrainedConfig(**keys))
    assert found == expected and type(found.scale) is float
    assert type(found.cap) is (float if expected.cap else type(None))
    assert hash(found) == hash(expected), "a value, which nothing changes"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "transform", [LogitsTransform(0.3), LogitsTransform(2.0), LogitsTransform(cap=2.0), LogitsTransform(1.7, 3.0)]
)
def test_scaled_and_capped_logits_give_the_loss_and_gradients_of_autograd(
    transform: LogitsTransform, bias: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "SOFTMAX_ELEMENTS", 100 * VOCABULARY)  # several chunks, the last one shorter
    tensors, targets = _head(dtype, 300, bias), _targets()
    exact = [t.detach().double().requires_grad_() for t in tensors]
    logits = exact[0] @ exact[1].t() + (exact[2] if bias else 0.0)
    logits = logits * transform.scale
    if transform.cap is not None:
        logits = transform.cap * torch.tanh(logits / transform.cap)
    expected = cross_entropy(logits, targets, reduction="sum")
    loss = supervised_loss(tensors[0], tensors[1], tensors[2] if bias else None, targets, transform)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    assert loss.dtype == dtype and loss.item() == pytest.approx(expected.item(), rel=tolerance)
    pairs = zip(torch.autograd.grad(loss, tensors), torch.autograd.grad(expected, exact), strict=True)
    for one, other in pairs:
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance * other.abs().max().item())


@pytest.mark.parametrize("trained", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_only_what_is_trained_gets_a_gradient_and_the_same_one(trained: tuple[int, ...]):
    tensors, targets = _head(torch.float64), _targets()
    every = torch.autograd.grad(supervised_loss(*tensors, targets), tensors)
    some = [t.detach().requires_grad_(i in trained) for i, t in enumerate(tensors)]
    supervised_loss(*some, targets).backward()
    for i, (tensor, gradient) in enumerate(zip(some, every, strict=True)):
        if i in trained:
            torch.testing.assert_close(tensor.grad, gradient, rtol=1e-12, atol=1e-12)
        else:
            assert tensor.grad is None


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_the_loss_of_a_models_own_logits_is_the_same(name: str):
    model = _build(name)
    inputs, positions, targets = _batch(model.config)
    set_packed_attention(model)
    ours = _gradients(model, first := model(**inputs, supervised_positions=positions, targets=targets).loss)
    use_stock_logits(model)
    rows: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda head, given, out: rows.append(out.shape[:-1].numel()))
    second = model(**inputs, supervised_positions=positions, targets=targets).loss
    assert rows == [len(positions)], "the head ran on the supervised positions alone"
    assert second.item() == pytest.approx(first.item(), rel=1e-6)
    theirs = _gradients(model, second)
    assert ours.keys() == theirs.keys()
    for parameter, gradient in theirs.items():
        if "k_proj.bias" not in parameter:  # zero on paper
            torch.testing.assert_close(ours[parameter], gradient, rtol=1e-4, atol=1e-5)


def test_a_forward_that_makes_all_logits_has_the_same_loss_of_the_supervised_ones():
    model: Any = _build("llama")
    inputs, positions, targets = _batch(model.config)
    set_packed_attention(model)
    expected = model(**inputs, supervised_positions=positions, targets=targets).loss
    use_stock_logits(model)
    stock = model.stock_forward
    model.stock_forward = lambda input_ids, labels=None, **more: stock(input_ids=input_ids, **more)
    found = model(**inputs, supervised_positions=positions, targets=targets).loss
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


def test_rows_of_the_head_that_are_trained_beside_it_are_in_the_loss():
    model = _build("llama")
    inputs, positions, targets = _batch(model.config)
    set_packed_attention(model)
    rows = targets[:3].tolist()
    adapted = _with_lora(model, trainable_token_indices={"lm_head": rows})
    delta = next(p for n, p in adapted.named_parameters() if "trainable_tokens_delta" in n)
    nn.init.normal_(delta)
    found = adapted(**inputs, supervised_positions=positions, targets=targets).loss
    logits = adapted(**inputs).logits[0, positions]
    expected = cross_entropy(logits, targets, reduction="sum")
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    gradients = [torch.autograd.grad(loss, delta, retain_graph=True)[0] for loss in (found, expected)]
    assert gradients[0].any()
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_labels_beside_supervised_positions_are_a_bug_of_the_caller():
    model = _build("llama")
    inputs, positions, targets = _batch(model.config)
    for wrong in ({"targets": targets, "labels": inputs["input_ids"]}, {}):
        with pytest.raises(AssertionError, match="with targets and without labels"):
            model(**inputs, supervised_positions=positions, **wrong)


def test_a_head_that_was_replaced_afterwards_is_noticed():
    model = _build("llama")
    inputs, positions, targets = _batch(model.config)
    model.set_output_embeddings(nn.Linear(64, VOCABULARY, bias=False))
    with pytest.raises(AssertionError, match="the head was replaced"):
        model(**inputs, supervised_positions=positions, targets=targets)


def test_memory_that_is_kept_between_calls_is_used_again_and_can_be_freed():
    tensors, targets = _head(), _targets()
    forget_workspaces()
    supervised_loss(*tensors, targets)
    kept = {name: space.buffer.data_ptr() for name, space in module._workspaces.items()}
    assert len(kept) == 3
    supervised_loss(*tensors, targets)
    assert {name: space.buffer.data_ptr() for name, space in module._workspaces.items()} == kept
    forget_workspaces()
    assert not module._workspaces


def test_a_second_backward_pass_is_refused_rather_than_wrong():
    tensors = _head()
    loss = supervised_loss(*tensors, _targets())
    loss.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="one backward pass"):
        loss.backward()


def test_certain_and_hopeless_predictions_have_a_finite_exact_loss():
    weight, hidden = torch.eye(4), torch.tensor([[200.0, 0, 0, 0]] * 2, requires_grad=True)
    loss = supervised_loss(hidden, weight, None, torch.tensor([0, 1]))
    loss.backward()
    assert loss.item() == 200.0
    assert hidden.grad is not None
    assert torch.equal(hidden.grad, torch.tensor([[0.0, 0, 0, 0], [1, -1, 0, 0]]))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.01), (torch.float16, 0.002)])
@pytest.mark.parametrize("weights", ["fp32 under autocast", "16 bits"])
def test_half_precision_and_loss_scaling_lose_only_rounding(dtype: torch.dtype, tolerance: float, weights: str):
    exact, targets = _head(torch.float64, bias=False), _targets()
    reference = cross_entropy(exact[0] @ exact[1].t(), targets, reduction="sum")
    expected = torch.autograd.grad(reference, exact)
    under_autocast = weights == "fp32 under autocast"
    tensors = _head(torch.float32 if under_autocast else dtype, bias=False)
    scale = 2.0**16 / len(targets) if dtype == torch.float16 else 1.0  # what GradScaler and the mean begin with
    with torch.autocast("cpu", dtype, enabled=under_autocast):
        loss = supervised_loss(tensors[0], tensors[1], None, targets)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(reference.item(), rel=tolerance)
    gradients = torch.autograd.grad(loss * scale, tensors)
    for tensor, gradient, other in zip(tensors, gradients, expected, strict=True):
        assert gradient.dtype == tensor.dtype
        assert gradient.isfinite().all()
        assert (gradient.double() / scale - other).norm() <= tolerance * other.norm()


def test_probabilities_near_the_smallest_fp16_number_are_not_rounded_away():
    """A million equally likely tokens: 1e-6 is 16.8 steps of fp16's smallest size, 1.3% off when rounded as it is."""
    generator = torch.Generator().manual_seed(4)
    weight = (1 + 0.1 * torch.randn(1_000_000, 4, generator=generator)).half()
    hidden = torch.zeros(1, 4).half().requires_grad_()
    supervised_loss(hidden, weight, None, torch.tensor([0])).backward()
    assert hidden.grad is not None
    pull = hidden.grad.double()[0] + weight[0].double()  # what all the other tokens add: the mean of the embeddings
    expected = weight.double().mean(0)
    assert (pull - expected).norm() <= 2e-3 * expected.norm()


class _Allocations(TorchDispatchMode):
    """Remembers the size of the largest fp32 tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32:
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("trains_head", [True, False])
def test_logits_of_all_positions_never_exist(trains_head: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "SOFTMAX_ELEMENTS", 16 * VOCABULARY)
    positions = 2048
    hidden, weight = _head(torch.bfloat16, positions, bias=False)
    weight.requires_grad_(trains_head)
    with _Allocations() as seen:
        supervised_loss(hidden, weight, None, _targets(positions)).backward()
    assert 0 < seen.elements <= max(16 * VOCABULARY, hidden.numel(), weight.numel())
    assert seen.elements < positions * VOCABULARY // 4


def test_no_supervised_position_gives_a_zero_that_is_connected():
    model = _build("opt")
    inputs, positions, targets = _batch(model.config)
    set_packed_attention(model)
    loss = model(**inputs, supervised_positions=positions[:0], targets=targets[:0]).loss
    gradients = _gradients(model, loss)
    assert loss.item() == 0.0
    assert gradients.keys() == {name for name, _ in model.named_parameters()}
    assert not any(gradient.any() for gradient in gradients.values())


def test_without_positions_the_models_own_forward_runs():
    model = _build("llama")
    inputs, _, _ = _batch(model.config)
    ids = inputs["input_ids"][:, :40]
    out = model(input_ids=ids, labels=ids)
    assert out.logits.shape == (1, 40, VOCABULARY)
    assert out.loss.item() == pytest.approx(cross_entropy(out.logits[0, :-1], ids[0, 1:]).item(), rel=1e-5)
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 43)


def test_gradient_checkpointing_changes_no_bit():
    model = _build("opt").train()
    set_packed_attention(model)
    inputs, positions, targets = _batch(model.config)
    runs = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        torch.manual_seed(3)
        runs.append(_gradients(model, model(**inputs, supervised_positions=positions, targets=targets).loss))
    assert all(torch.equal(gradient, runs[1][name]) for name, gradient in runs[0].items())


def test_evaluation_computes_no_gradient():
    hidden, weight = _head(bias=False)
    with torch.no_grad(), _Allocations() as seen:
        loss = supervised_loss(hidden, weight, None, _targets())
    assert not loss.requires_grad
    assert seen.elements <= 300 * VOCABULARY


@pytest.mark.parametrize("options", [{"modules_to_save": ["lm_head"]}, {"target_modules": ["q_proj", "lm_head"]}])
def test_an_adapter_on_the_head_is_refused(options: dict[str, list[str]]):
    model = _build("llama")
    adapted = get_peft_model(model, LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **options}))
    inputs, positions, targets = _batch(model.config)
    with pytest.raises(UserError, match="lm_head"):
        adapted(**inputs, supervised_positions=positions, targets=targets)
    with pytest.raises(UserError, match="lm_head"):
        install_supervised_loss(adapted)
