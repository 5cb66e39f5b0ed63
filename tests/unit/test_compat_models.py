"""Every private member of a library that models and checkpoints use does in the installed version what they need."""

import re
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, BertForSequenceClassification, OPTConfig
from transformers.integrations import deepspeed as deepspeed_integration

from isotune.compat import bitsandbytes as bitsandbytes_compat
from isotune.compat import deepspeed as deepspeed_compat
from isotune.compat import peft as peft_compat
from isotune.compat import torch as torch_compat
from isotune.compat import transformers as transformers_compat
from isotune.models.opening import four_bit_config


def opt() -> torch.nn.Module:
    small = {"ffn_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 8}
    config = OPTConfig(vocab_size=10, hidden_size=8, word_embed_proj_dim=8, **small)
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.skipif(not torch_compat.has_onednn_linear(), reason="this build of torch has no oneDNN")
def test_onednn_linear_is_the_product_with_the_transposed_weight_and_the_bias():
    x, weight, bias = torch.randn(3, 5), torch.randn(4, 5), torch.randn(4)
    assert torch.allclose(torch_compat.onednn_linear(x, weight, bias), x @ weight.T + bias, atol=1e-5)


def test_softmax_backward_is_the_gradient_that_autograd_computes():
    scores, upstream = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True), torch.randn(2, 3, 5).double()
    weights = scores.softmax(-1)
    weights.backward(upstream)
    assert scores.grad is not None
    assert torch.allclose(torch_compat.softmax_backward(upstream, weights.detach(), -1, torch.float64), scores.grad)


def test_a_change_in_place_is_counted_and_a_read_is_not():
    x = torch.zeros(2)
    before = torch_compat.in_place_changes(x)
    _ = x + 1
    assert torch_compat.in_place_changes(x) == before
    x.add_(1)
    assert torch_compat.in_place_changes(x) == before + 1


def test_a_wrapper_tensor_has_a_size_and_no_memory():
    dispatch = {"__torch_dispatch__": classmethod(lambda *_: None)}  # torch asks every subclass for one
    made = torch_compat.wrapper_tensor(type("Wrapper", (torch.Tensor,), dispatch), 10**15, torch.bfloat16)
    assert (made.shape, made.dtype) == ((10**15,), torch.bfloat16)


def test_the_second_rank_of_two_begins_after_the_rows_of_the_first():
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        whole = DTensor.from_local(torch.zeros(2, 3), init_device_mesh("cpu", (2,)), [Shard(0)], run_check=False)
        assert torch_compat.global_offset(whole) == (2, 0)
    finally:
        dist.destroy_process_group()


def test_models_are_whole_within_and_partitioned_again_after():
    announced = deepspeed_integration.HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    try:
        with deepspeed_compat.whole_models():
            assert not deepspeed_integration.is_deepspeed_zero3_enabled()
        assert deepspeed_integration.is_deepspeed_zero3_enabled()
        deepspeed_compat.load_whole_models()
        assert not deepspeed_integration.is_deepspeed_zero3_enabled()
    finally:
        deepspeed_integration.unset_hf_deepspeed_config()
        del announced


def test_deepspeeds_optimizers_have_the_methods_that_checkpoints_call():
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    stage3 = (
        "_get_param_partition_group",
        "_reassign_or_swap_out_partitioned_parameters",
        "_swappable_optimizer_subgroup",
        "get_full_hp_param",
        "get_param_id",
    )
    assert [name for name in stage3 if not hasattr(DeepSpeedZeroOptimizer_Stage3, name)] == []
    assert hasattr(DeepSpeedZeroOptimizer, "update_lp_params")


def test_zero3_takes_the_gradient_of_a_share():
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    class Engine:
        offload_optimizer = False
        held = torch.zeros(3)
        set_local_grad_for_param = DeepSpeedZeroOptimizer_Stage3.set_local_grad_for_param

        def _get_fp32_grad_state_partition(self, param, release_swap_buffers):
            return self.held, 0

        def _swappable_optimizer_subgroup(self, group):
            return False

    parameter = torch.nn.Parameter(torch.zeros(0))
    parameter.ds_id, parameter.ds_tensor, parameter._z3_optimizer = 0, torch.zeros(3), Engine()
    assert deepspeed_compat.zero3_padded_share(parameter) == 3
    deepspeed_compat.set_zero3_gradient(parameter, torch.tensor([1.0, 2.0, 3.0]))
    assert Engine.held.tolist() == [1.0, 2.0, 3.0]


def test_zero3_gathers_with_a_module_what_it_was_told_to():
    from deepspeed.runtime.zero.partitioned_param_coordinator import iter_params

    layer, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    assert not deepspeed_compat.is_gathered_with(layer, other.weight)
    deepspeed_compat.gather_with(layer, [other.weight])
    assert deepspeed_compat.is_gathered_with(layer, other.weight)
    assert not deepspeed_compat.is_gathered_with(layer, other.bias)
    assert [id(p) for p in iter_params(layer)] == [id(p) for p in (layer.weight, layer.bias, other.weight)]


def test_names_of_an_adapter_are_those_in_its_file_with_dora_and_a_whole_module(tmp_path):
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj"], use_dora=True, modules_to_save=["fc1"], task_type=peft.TaskType.CAUSAL_LM
    )
    model = peft.get_peft_model(opt(), config)
    peft_compat.save_adapter(model, tmp_path)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    with safe_open(tmp_path / "adapter_model.safetensors", framework="pt") as tensors:
        assert {peft_compat.name_in_adapter_file(name) for name in trained} == set(tensors.keys())


def test_a_classifier_in_a_peft_model_gets_the_arguments_that_were_given_and_no_others():
    given = {"input_ids": 1, "inputs_embeds": None, "labels": None, "return_dict": True}
    assert peft_compat.given_arguments(given) == {"input_ids": 1}


def test_4_bit_layers_are_kept_trainable_and_a_head_is_found_wherever_it_is():
    layers = pytest.importorskip("bitsandbytes").nn
    model = torch.nn.Sequential(layers.Linear4bit(64, 64))
    model[0].support_avx512bf16_for_cpu = True
    bitsandbytes_compat.keep_trainable(model)
    assert model[0].support_avx512bf16_for_cpu is False
    assert hasattr(layers.Linear4bit(64, 64), "support_avx512bf16_for_cpu")
    (pattern,) = four_bit_config("nf4", True, torch.float32, ["pooler"]).llm_int8_skip_modules or []
    assert [bool(re.fullmatch(pattern, name)) for name in ("pooler", "bert.pooler", "bert.poolers")] == [1, 1, 0]
    assert four_bit_config("nf4", True, torch.float32, []).llm_int8_skip_modules is None


def test_attention_and_head_of_a_model_type_are_known_without_its_weights():
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=10)
    transformers_compat.set_attention_of(config, "eager")
    model = BertForSequenceClassification(config)
    assert transformers_compat.attention_of(model.config) == "eager"
    assert transformers_compat.lets_attention_be_replaced(model)
    assert not transformers_compat.lets_attention_be_replaced(torch.nn.Linear(1, 1))
    transformers_compat.set_sharded_classes(model, ["BertLayer"])
    assert model._no_split_modules == ["BertLayer"]
    model._keys_to_ignore_on_save = {"a"}
    assert transformers_compat.ignored_on_save(model) == {"a"}


def test_peft_gives_experts_what_was_asked_for_layers_of_their_names():
    config = AutoConfig.for_model(
        "glm4_moe", vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=8, moe_intermediate_size=8, n_routed_experts=2, num_experts_per_tok=1,
        first_k_dense_replace=0,
    )  # fmt: skip
    names = peft_compat.names_of_experts("glm4_moe")
    asked = peft.LoraConfig(r=2, target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"])
    adapted: Any = peft.get_peft_model(AutoModelForCausalLM.from_config(config), asked)
    modules = {name.rsplit(".", 1)[-1] for name, module in adapted.named_modules() if hasattr(module, "base_layer")}
    assert names >= {"gate_proj", "up_proj", "down_proj"} and not names & {"q_proj", "o_proj"}
    assert "q_proj" in modules and not modules & names, "peft no longer does so: names_of_experts can go"
    assert peft_compat.names_of_experts("llama") == frozenset()


def test_peft_refuses_lora_on_layers_that_mambas_kernels_read():
    mamba, other = (AutoModelForCausalLM.from_config(AutoConfig.for_model(
        kind, vocab_size=32, hidden_size=8, num_hidden_layers=1)) for kind in ("mamba", "mamba"))  # fmt: skip
    assert peft_compat.refused_in_mamba(mamba, "out_proj") and not peft_compat.refused_in_mamba(mamba, "in_proj")
    with pytest.raises(ValueError, match="incompatible with Mamba"):
        peft.get_peft_model(mamba, peft.LoraConfig(target_modules=["out_proj"]))
    peft.get_peft_model(other, peft.LoraConfig(target_modules=["in_proj"]))
    assert not peft_compat.refused_in_mamba(opt(), "out_proj")
