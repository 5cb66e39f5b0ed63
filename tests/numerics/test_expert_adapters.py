"""LoRA on the weights of experts: the gradients of stock peft on each document alone, saved, merged and reopened."""

import pytest
import transformers
from tests.causal_models import measure, small_model
from tests.small_adapters import recipe_in

from isotune.io.errors import UserError
from isotune.models.adapters.lora import add_adapters
from isotune.models.adapters.targets import check_parameters

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
OTHERS = ("mixtral", "gpt_oss", "deepseek_v3", "olmoe")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen2_moe", *OTHERS])
def test_a_packed_row_has_the_gradients_of_stock_peft_and_the_merged_model_its_logits(tmp_path, kind):
    transformers.logging.set_verbosity_error()
    (tmp_path / "base").mkdir()
    adapted = add_adapters(small_model(kind), recipe_in(tmp_path, target_parameters=EXPERTS))
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad and ".experts." in name}
    experts = {name for name, _ in adapted.named_modules() if name.endswith(".experts")}
    assert len(experts) >= 1 and len(trained) == 4 * len(experts)  # A and B of two matrices
    row = measure(kind, target_parameters=EXPERTS)
    assert row.lora.gradient is not None and row.lora.gradient <= 1e-5
    assert row.lora.export is not None and row.lora.export <= 1e-5


@pytest.mark.parametrize(("values", "says"), [
    ({"target_parameters": ["experts.gate_proj_up"]}, "did you mean 'experts.gate_up_proj'"),
    ({"target_parameters": EXPERTS, "lora_dropout": 0.1}, "say lora_dropout: 0"),
    ({"target_parameters": EXPERTS, "init_lora_weights": "pissa"}, "init_lora_weights: pissa is for layers"),
    ({"target_parameters": EXPERTS, "use_dora": True}, "peft cannot add these adapters: .*use_dora"),
    ({"target_parameters": EXPERTS, "layers_to_transform": [0]}, "layers_to_transform is for layers"),
    ({"target_parameters": EXPERTS, "tune": "qlora"}, "target_parameters has no effect: it needs tune: lora"),
])  # fmt: skip
def test_what_peft_cannot_adapt_is_refused_in_one_sentence(tmp_path, values, says):
    (tmp_path / "base").mkdir()
    with pytest.raises(UserError, match=says):
        add_adapters(small_model("qwen2_moe"), recipe_in(tmp_path, **values))
    with pytest.raises(UserError, match="it has no experts whose matrices are one weight"):
        add_adapters(small_model("llama"), recipe_in(tmp_path, target_parameters=EXPERTS))


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "qwen2_moe"])
def test_a_regular_expression_adapts_the_layers_that_it_matches_and_no_others(tmp_path, kind):
    (tmp_path / "base").mkdir()
    asked = {"target_modules": r".*layers\.0\..*q_proj", "lora_dropout": 0.0}
    adapted = add_adapters(small_model(kind), recipe_in(tmp_path, **asked))
    trained = {name.partition(".lora_")[0] for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained == {"base_model.model.model.layers.0.self_attn.q_proj"}


def test_an_estimate_of_fewer_blocks_takes_names_of_experts_that_it_lacks(tmp_path):
    (tmp_path / "base").mkdir()
    asked = {"target_parameters": ["layers.7.mlp.experts.down_proj"]}
    with pytest.raises(UserError, match=r"target_parameters names 'layers.7.mlp.experts.down_proj'"):
        add_adapters(small_model("qwen2_moe"), recipe_in(tmp_path, **asked))
    check_parameters(small_model("qwen2_moe").to("meta"), recipe_in(tmp_path, **asked))
