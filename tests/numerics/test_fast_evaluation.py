"""The switches of an evaluation on CPU change logits by rounding only, are really on, and leave nothing behind."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers import AutoConfig, AutoModelForSequenceClassification

from isotune.models.classifier import fast_evaluation, install_classification
from isotune.models.cpu.cls_only import BLOCKS
from isotune.models.cpu.functional import Workspace, onednn_products

LENGTHS = (1, 40, 3, 90, 17)
TARGETS = r".*\.(query|value|q_lin|v_lin|lin1)"
KINDS = ("albert", "bert", "camembert", "distilbert", "roberta", "xlm-roberta")


def classifier(kind: str):
    torch.manual_seed(3)
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    if kind == "distilbert":
        small = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}
    if kind == "albert":
        small |= {"embedding_size": 16}
    config = AutoConfig.for_model(
        kind, vocab_size=300, num_labels=3, pad_token_id=1, max_position_embeddings=130, initializer_range=0.2, **small
    )
    model = AutoModelForSequenceClassification.from_config(config).eval()
    for parameter in model.parameters():  # biases start at zero, which would hide what depends on them
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def documents() -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(4)
    return [torch.randint(4, 300, (length,), generator=draw) for length in LENGTHS]


def packed(texts: list[torch.Tensor]) -> dict:
    bounds = torch.tensor([0, *torch.tensor([len(text) for text in texts]).cumsum(0)], dtype=torch.int32)
    longest = max(map(len, texts))
    return {"input_ids": torch.cat(texts)[None], "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds,
            "max_length_q": longest, "max_length_k": longest}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lora", [False, True])
def test_logits_are_those_of_each_text_alone_by_transformers(kind, lora):
    texts, stock, ours = documents(), classifier(kind), classifier(kind)
    install_classification(ours)
    if lora:
        stock, ours = (
            get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules=TARGETS, r=4)).eval()
            for model in (stock, ours)
        )
        for name, parameter in ours.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        stock.load_state_dict(ours.state_dict())
    with torch.inference_mode():
        expected = torch.stack([stock(input_ids=text[None]).logits[0] for text in texts])
        with fast_evaluation(ours):
            found = ours(**packed(texts)).logits
        plain = ours(**packed(texts)).logits
    assert expected.std() > 0.05
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(found, plain, rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", sorted(BLOCKS))
def test_the_last_block_computes_one_token_a_document_and_no_linear_layer_is_torchs_own(kind, monkeypatch):
    model, seen = classifier(kind), []
    install_classification(model)
    linears = [module for module in model.base_model.modules() if isinstance(module, torch.nn.Linear)]
    monkeypatch.setattr("isotune.models.cpu.functional._stock_linear", lambda *_: pytest.fail("torch's own linear"))
    for module in linears:
        module.register_forward_hook(lambda _m, args, _out: seen.append(args[0].numel() // args[0].shape[-1]))
    with torch.inference_mode(), fast_evaluation(model):
        model(**packed(documents()))
    tokens, firsts = sum(LENGTHS), len(LENGTHS)
    # of a block's six products the last block makes keys and values alone for every token; BERT has its pooler besides
    assert seen[:6] == [tokens] * 6
    assert sorted(seen[6:12]) == [firsts] * 4 + [tokens] * 2


def test_where_gradients_are_on_and_after_the_evaluation_nothing_has_changed():
    model, inputs = classifier("bert"), packed(documents())
    install_classification(model)
    stock, blocks = functional.linear, [block.forward for block in model.bert.encoder.layer]
    plain = model(**inputs).logits
    with fast_evaluation(model):
        assert functional.linear is not stock
        trained = model(**inputs).logits
    assert torch.equal(trained, plain) and trained.grad_fn is not None
    assert functional.linear is stock
    assert [block.forward for block in model.bert.encoder.layer] == blocks
    assert torch.equal(model(**inputs).logits, plain)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_product_is_that_of_float64_however_it_lies_in_memory(transposed):
    draw = torch.Generator().manual_seed(0)
    x, weight = torch.randn(40, 2, 64, generator=draw), torch.randn(48, 64, generator=draw)
    expected = x.double() @ weight.double().T
    if transposed:
        x, weight = x.transpose(0, 1).contiguous().transpose(0, 1), weight.T.contiguous().T
    with torch.no_grad(), onednn_products():
        found = functional.linear(x, weight)
        empty = functional.linear(x[:0], weight)
        half = functional.linear(x.bfloat16(), weight.bfloat16())
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4)
    assert empty.shape == (0, 2, 48) and half.dtype == torch.bfloat16


def test_a_workspace_is_the_same_memory_for_tensors_of_one_type_that_fit_into_it():
    space = Workspace()
    first = space.empty((4, 6), torch.float32)
    assert (first.shape, first.dtype) == ((4, 6), torch.float32)
    for shape in ((4, 6), (2, 3), (24,), (3, 8)):
        again = space.empty(shape, torch.float32)
        assert again.shape == shape and again.data_ptr() == first.data_ptr()
    larger = space.empty((5, 5), torch.float32)
    assert larger.shape == (5, 5) and space.buffer.numel() == 25
    other = space.empty((2, 2), torch.int64)
    assert (other.shape, other.dtype) == ((2, 2), torch.int64)
    assert space.empty((2, 2), torch.float32).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 8), (0, 8), (8,)])
@pytest.mark.parametrize("bias", [True, False])
def test_products_that_onednn_does_not_take_are_torchs_own(dtype: torch.dtype, shape: tuple[int, ...], bias: bool):
    draw = torch.Generator().manual_seed(1)
    rows, weight = torch.randn(shape, generator=draw).to(dtype), torch.randn(6, 8, generator=draw).to(dtype)
    offset = torch.randn(6, generator=draw).to(dtype) if bias else None
    weights = (weight, torch.nn.Parameter(weight), weight.t().contiguous().t())
    cases: list[tuple] = [(rows, one, offset) for one in weights]
    cases += [] if bias else [(rows, weight[0].contiguous(), None)]  # a weight of one output has one axis
    for given in cases:
        expected = torch.nn.functional.linear(*given)
        with torch.no_grad(), onednn_products():
            found = torch.nn.functional.linear(*given)
        assert found.dtype == dtype and found.shape == expected.shape
        torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-5)
