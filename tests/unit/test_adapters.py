"""Every kind of adapter trains the layers that its keys say, and merges into the model that it is on its base."""

import re

import pytest
import torch
import yaml
from peft.optimizers import create_loraplus_optimizer
from tests.building import small_opt
from tests.causal_models import small_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
)

from isotune.checkpoint.final_model import save_and_verify
from isotune.config import ClassificationRecipe, Recipe
from isotune.io.errors import UserError
from isotune.models.adapters.lora import add_adapters
from isotune.models.adapters.targets import choose_targets
from isotune.models.base.builtin import builtin_tokenizer
from isotune.models.finished_run import merge_run, read_run
from isotune.training.trainer import raise_learning_rate

GIVEN = {"dataset_name": "builtin:capitals", "output_dir": "run"}
SMALL = {"vocab_size": 96, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}


def recipe(kind=Recipe, **values):
    return kind.from_values(model_name_or_path="builtin:opt-tiny", **GIVEN, **values)


def opt():
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(
        "opt", **SMALL, word_embed_proj_dim=8, ffn_dim=32, max_position_embeddings=32))  # fmt: skip


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=16, n_layer=3, n_head=2, n_positions=32))


def mistral():
    return MistralForCausalLM(MistralConfig(**SMALL, num_key_value_heads=1, intermediate_size=32))


def bert():
    return BertForSequenceClassification(BertConfig(**SMALL, intermediate_size=32))


def adapted_layers(model) -> set[str]:
    """The layers of the base that peft really gave an adapter, by their whole names."""
    prefix = "base_model.model."
    found = {name for name, module in model.named_modules() if hasattr(module, "base_layer")}
    return {name.removeprefix(prefix) for name in found}


BLOCK = {
    "mistral": "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj",
    "gpt2": "c_attn c_proj c_fc",
    "bert": "query key value dense",
}


@pytest.mark.parametrize("make", [mistral, gpt2, bert], ids=lambda make: make.__name__)
def test_all_linear_is_every_linear_layer_of_the_blocks_and_nothing_else(make):
    kind = ClassificationRecipe if make is bert else Recipe
    expected = {
        name
        for name, module in make().named_modules()
        if re.search(r"\.\d+\.", name) and name.rsplit(".", 1)[-1] in BLOCK[make.__name__].split()
    }
    assert len(expected) == 3 * {"mistral": 7, "gpt2": 4, "bert": 6}[make.__name__]
    asked = add_adapters(make(), recipe(kind, target_modules="all-linear"))
    assert adapted_layers(asked) - {"classifier", "bert.pooler"} == expected
    if make is not bert:  # whose targets are listed
        assert adapted_layers(add_adapters(make(), recipe(kind))) == expected


@pytest.mark.parametrize("make", [mistral, gpt2, bert, opt], ids=lambda make: make.__name__)
def test_frozen_matrices_keep_their_type_beside_trained_biases(make):
    kind = ClassificationRecipe if make is bert else Recipe
    adapted = add_adapters(make().bfloat16(), recipe(kind, tune="lora", bias="all", bf16=True))
    for name, parameter in adapted.named_parameters():
        is_matrix = parameter.dim() == 2 and not parameter.requires_grad
        assert not is_matrix or parameter.dtype == torch.bfloat16, name
        assert not parameter.requires_grad or parameter.dtype == torch.float32, name


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, r"layers\.\d\.(self_attn\.(q|k|v|out)_proj|fc\d)"),  # the listed default of OPT: not project_in
        ({"target_modules": "all-linear"}, r"layers\.\d\.(self_attn\.(q|k|v|out)_proj|fc\d)"),
        ({"target_modules": ["q_proj", "self_attn.v_proj"]}, r"layers\.\d\.self_attn\.(q|v)_proj"),
        ({"target_modules": r".*layers\.[02]\..*\.(q|k)_proj"}, r"layers\.[02]\.self_attn\.(q|k)_proj"),
        ({"target_modules": "q_proj,fc1", "exclude_modules": "1.fc1"}, r"layers\.(\d\.self_attn\.q_proj|[02]\.fc1)"),
        ({"target_modules": "all-linear", "exclude_modules": r".*fc\d"}, r"layers\.\d\.self_attn\.(q|k|v|out)_proj"),
        ({"layers_to_transform": [2], "target_modules": "fc2"}, r"layers\.2\.fc2"),
        ({"layers_to_transform": [0, 1], "target_modules": r".*fc\d"}, r"layers\.[01]\.fc\d"),
        ({"peft_type": "ia3", "target_modules": "k_proj,v_proj,fc2"}, r"layers\.\d\.(self_attn\.(k|v)_proj|fc2)"),
    ],
    ids=str,
)  # fmt: skip
def test_the_layers_that_the_keys_name_get_an_adapter(values, expected):
    model = opt()
    prefix = "model.decoder."
    wanted = {name for name, _ in model.named_modules() if re.fullmatch(expected, name.removeprefix(prefix))}
    assert wanted
    assert adapted_layers(add_adapters(model, recipe(**values))) == wanted
    assert set(choose_targets(opt(), recipe(**values)).names) == wanted


def test_layers_with_the_names_of_experts_are_left_out_or_refused_and_never_others_in_their_place():
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(
        "glm4_moe", **SMALL, num_key_value_heads=1, intermediate_size=32, moe_intermediate_size=8, n_routed_experts=4,
        num_experts_per_tok=2, first_k_dense_replace=1))  # fmt: skip
    targets, experts = choose_targets(model, recipe()), {"gate_proj", "up_proj", "down_proj"}
    assert {name.rsplit(".", 2)[1] for name in targets.left_out} == {"mlp", "shared_experts"}
    assert {name.rsplit(".", 1)[-1] for name in targets.left_out} == experts
    assert len(targets.left_out) == 3 * len(experts)
    for values in ({"target_modules": ["q_proj", "up_proj"]}, {"target_modules": r".*(q|up)_proj"}):
        with pytest.raises(UserError, match=r"mlp\.up_proj, and peft takes 'up_proj' for the experts"):
            choose_targets(model, recipe(**values))
    mamba = AutoModelForCausalLM.from_config(AutoConfig.for_model(
        "mamba", vocab_size=96, hidden_size=16, num_hidden_layers=2, state_size=4))  # fmt: skip
    reached = choose_targets(mamba, recipe())
    assert {name.rsplit(".", 1)[-1] for name in reached.left_out} == {"out_proj", "dt_proj", "x_proj"}
    with pytest.raises(UserError, match="out_proj, and peft refuses 'out_proj' in model type 'mamba': leave it out"):
        choose_targets(mamba, recipe(target_modules="out_proj"))
    assert adapted_layers(add_adapters(mamba, recipe())) == set(reached.names)
    scaled = choose_targets(model, recipe(peft_type="ia3"))
    assert not scaled.left_out and any(name.endswith("shared_experts.up_proj") for name in scaled.names)
    assert adapted_layers(add_adapters(model, recipe())) == set(targets.names)


@pytest.mark.parametrize(("kind", "without"), [
    ("llama4_text", "router"), ("gemma3n_text", None), ("falcon_mamba", "dt_proj"), ("falcon_mamba", "x_proj"),
    ("bamba", "mamba.out_proj"), ("jamba", "dt_proj"), ("granitemoehybrid", "mamba.out_proj"),
])  # fmt: skip
def test_the_default_rule_takes_layers_whose_product_an_adapter_changes(kind, without):
    """Llama 4's router returns two tensors, Gemma 3n has a name that ends as its blocks do, scans read weights."""
    model = small_model(kind)
    targets, names = choose_targets(model, recipe()), [name for name, _ in model.named_modules()]
    adapted = add_adapters(model, recipe(lora_dropout=0.0))
    assert adapted_layers(adapted) == set(targets.names)
    if without is not None:
        assert any(name.endswith(without) for name in names)
        assert not any(name.endswith(without) for name in targets.names)
    torch.nn.functional.cross_entropy(
        adapted(input_ids=torch.arange(4, 20)[None], use_cache=False).logits[0], torch.arange(16)
    ).backward()
    silent = [name for name, p in adapted.named_parameters() if ".lora_B." in name and not p.grad.abs().sum()]
    assert not silent


def test_a_product_by_groups_of_features_is_left_out_and_refused():
    model = small_model("deepseek_v4")
    targets = choose_targets(model, recipe())
    assert {name.rsplit(".", 1)[-1] for name in targets.left_out} == {"o_a_proj"} and len(targets.left_out) == 2
    assert adapted_layers(add_adapters(model, recipe())) == set(targets.names)
    with pytest.raises(UserError, match="o_a_proj' of model type 'deepseek_v4' multiplies groups of features apart"):
        choose_targets(model, recipe(target_modules="o_a_proj"))


def test_patterns_give_layers_their_own_rank_and_scale():
    values = {"rank_pattern": {"q_proj": 2, "layers.0.fc1": 3}, "alpha_pattern": '{"q_proj": 7}', "r": 4}
    model = add_adapters(opt(), recipe(lora_alpha=8, **values))
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            rank = 2 if name.endswith("q_proj") else 3 if name.endswith("layers.0.fc1") else 4
            assert module.lora_A["default"].weight.shape[0] == rank
            assert module.scaling["default"] == (7 if name.endswith("q_proj") else 8) / rank


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"target_modules": "q_prj"}, "target_modules names 'q_prj', which OPTForCausalLM does not have: did you mean"),
        ({"target_modules": "all_linear"}, "did you mean 'all-linear'"),
        ({"target_modules": r".*qproj.*"}, r"target_modules names '.*qproj.*', which"),
        ({"target_modules": "(q_proj"}, "is no regular expression"),
        ({"target_modules": ["q_proj", r".*fc\d"]}, "beside other items"),
        ({"target_modules": "lm_head"}, "target_modules names 'lm_head'"),
        ({"target_modules": "q_proj", "exclude_modules": "fc1"}, "exclude_modules names 'fc1', which target"),
        ({"target_modules": "q_proj", "exclude_modules": "q_proj"}, "exclude_modules leaves no layer"),
        ({"layers_to_transform": [3]}, "layers_to_transform names layer 3, .* in the blocks 0 to 2"),
        ({"rank_pattern": {"q_prj": 2}}, "rank_pattern names 'q_prj', .* did you mean 'q_proj'"),
        ({"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern gives 'x' for 'q_proj'"),
        ({"modules_to_save": ["embed_token"]}, "modules_to_save names 'embed_token', .* did you mean 'embed_tokens'"),
        ({"modules_to_save": ["fc1"]}, "modules_to_save names 'fc1', which gets an"),
        ({"peft_type": "ia3", "r": 4}, "r has no effect: it needs .* peft_type: lora"),
    ],
    ids=str,
)  # fmt: skip
def test_a_name_that_matches_nothing_is_refused_with_the_nearest(values, says):
    with pytest.raises(UserError) as refused:
        add_adapters(opt(), recipe(**values))
    assert re.search(says if ".*" in says and "qproj" not in says else re.escape(says), str(refused.value))


MERGED = [
    {},
    {"target_modules": "all-linear", "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"fc1": 3}},
    {"layers_to_transform": [1], "exclude_modules": "fc1"},
    {"use_rslora": True, "bias": "lora_only"},
    {"bias": "all", "modules_to_save": ["final_layer_norm"]},
    {"use_dora": True},
    {"use_dora": True, "use_rslora": True, "rank_pattern": {"q_proj": 2}},
    {"init_lora_weights": "gaussian"},
    {"init_lora_weights": "orthogonal", "r": 4},
    {"peft_type": "ia3"},
    {"peft_type": "ia3", "target_modules": "k_proj,v_proj,fc2"},
]


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        *(("opt", values) for values in MERGED),
        ("gpt2", MERGED[0]),
        ("gpt2", MERGED[-1]),
        *(pytest.param("gpt2", values, marks=pytest.mark.slow) for values in MERGED[1:-1]),
    ],
    ids=str,
)
def test_what_peft_can_merge_is_merged_with_its_parity_figure(tmp_path, kind, values):
    if kind == "gpt2" and {"exclude_modules", "rank_pattern"} & values.keys():
        values = {**values, "exclude_modules": "c_fc", "rank_pattern": {"c_attn": 2}, "alpha_pattern": {"c_proj": 3}}
    if kind == "gpt2" and ("modules_to_save" in values or "k_proj" in str(values)):
        values = {
            **values,
            **({"modules_to_save": ["ln_f"]} if "bias" in values else {"target_modules": "c_attn,c_proj"}),
        }
    tokenizer = builtin_tokenizer("builtin:opt-tiny")
    base = tmp_path / "base"
    if kind == "opt":
        small_opt(base)
    else:
        torch.manual_seed(0)
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 256, "initializer_range": 0.1}
        GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes)).save_pretrained(base)
    model = add_adapters(AutoModelForCausalLM.from_pretrained(base), recipe(tune="lora", **values))
    with torch.no_grad():  # as if trained
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    model.peft_config["default"].base_model_name_or_path = str(base)
    save_and_verify(model, tokenizer, tmp_path / "run" / "model")
    (tmp_path / "run" / "recipe.yaml").write_text(yaml.safe_dump({"tune": "lora", "bf16": False}))
    merged, _, parity = merge_run(read_run(tmp_path / "run"))
    tokens = torch.randint(len(tokenizer), (2, 24))
    with torch.no_grad():
        adapted = model.eval()(tokens).logits
        plain = AutoModelForCausalLM.from_pretrained(base).eval()(tokens).logits
        found = merged(tokens).logits
    assert parity.holds and parity.largest_difference < 1e-4 * parity.largest_logit
    assert (found - adapted).abs().max() < 1e-5 * adapted.abs().max()
    assert (found - plain).abs().max() > 1e-3, "the adapter changes nothing"


def test_the_rates_of_loraplus_are_pefts():
    model = add_adapters(opt(), recipe(target_modules="q_proj,fc1", bias="none"))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    expected = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0)
    ours = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    raise_learning_rate(ours, {number for number, name in names.items() if ".lora_B." in name}, 16.0)
    rates = [
        {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
        for optimizer in (expected, ours)
    ]
    assert rates[0] == pytest.approx(rates[1])
    assert set(rates[1].values()) == {1e-3, 1.6e-2}
