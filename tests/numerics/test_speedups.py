"""With every switch on, a step is the same step."""

import platform

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional
from transformers import OPTConfig, OPTForCausalLM

from isotune.models.cpu.layers import enable_speedups, keep_freed_memory
from isotune.models.document_dropout import training_microbatch
from isotune.models.document_keys import MicrobatchDocuments
from isotune.models.packed_attention import document_position_ids, set_packed_attention
from isotune.models.supervised_loss import install_supervised_loss

DOCUMENTS = MicrobatchDocuments([2, 9, 5], [40, 3, 127])


def _model(tune: str, dropout: float) -> nn.Module:
    torch.manual_seed(0)
    config = OPTConfig(
        hidden_size=64, word_embed_proj_dim=32, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=300,
        dropout=dropout, attention_dropout=dropout, init_std=0.1,
    )  # fmt: skip
    model: nn.Module = OPTForCausalLM(config)
    set_packed_attention(model)
    install_supervised_loss(model)
    if tune == "lora":
        targets = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
        model = get_peft_model(model, LoraConfig(r=4, target_modules=targets, lora_dropout=dropout))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
    return model.train()


def _step(model: nn.Module) -> tuple[float, dict[str, torch.Tensor]]:
    bounds = torch.tensor([0, 40, 43, 170], dtype=torch.int32)
    ids = torch.randint(4, 300, (1, 170), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(3, 39)
    torch.manual_seed(2)
    model.zero_grad()
    with training_microbatch(DOCUMENTS):
        loss = model(
            input_ids=ids,
            position_ids=document_position_ids(model.config, bounds),
            cu_seq_lens_q=bounds,
            cu_seq_lens_k=bounds,
            max_length_q=127,
            max_length_k=127,
            supervised_positions=positions,
            targets=ids[0, positions + 1],
            use_cache=False,
        ).loss
        loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_the_switches_change_a_step_by_rounding_only(tune: str):
    plain, fast = _model(tune, 0.0), _model(tune, 0.0)
    enable_speedups(fast)
    (loss, gradients), (other, others) = _step(plain), _step(fast)
    assert other == pytest.approx(loss, rel=1e-6)
    assert gradients.keys() == others.keys()
    largest = max(g.norm() for g in gradients.values())
    assert all((others[name] - gradient).norm() <= 1e-6 * largest for name, gradient in gradients.items())


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_a_seeded_step_with_every_kind_of_dropout_repeats_to_the_bit(tune: str):
    model = _model(tune, 0.2)
    enable_speedups(model)
    (loss, gradients), (again, others) = _step(model), _step(model)
    assert loss == again
    assert all(torch.equal(gradient, others[name]) for name, gradient in gradients.items())


def test_stock_dropout_is_back_after_a_pass_even_a_failed_one():
    stock = functional.dropout
    with pytest.raises(RuntimeError, match="on purpose"), training_microbatch(DOCUMENTS):
        assert functional.dropout is not stock
        raise RuntimeError("on purpose")
    assert functional.dropout is stock


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_freed_memory_is_used_again_without_page_faults():
    import resource

    assert keep_freed_memory()
    faults = []
    for _ in range(6):  # 64 MiB each time, in blocks of 8: 16,384 pages
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        blocks = [torch.ones(2 * 2**20) for _ in range(8)]
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        del blocks
    assert faults[-1] < 1000  # by default every round meets all of its pages as new ones
