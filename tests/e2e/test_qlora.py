"""QLoRA: the base really lies in 4 bits, doubly quantised, the adapter learns on top and loads again."""

import copy
import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM, get_peft_model
from tests.building import Built, build, each_document, loss_of_document, small_opt
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from isotune.config import Recipe
from isotune.io.errors import UserError
from isotune.models.opening import load_base_model, load_config
from isotune.training.from_recipe import save

bitsandbytes = pytest.importorskip("bitsandbytes")
from bitsandbytes.nn import Linear4bit  # noqa: E402

# multiples of bitsandbytes' block of 64, without which its own inference on CPU fails
GEOMETRY = {"hidden_size": 128, "word_embed_proj_dim": 64, "ffn_dim": 128, "do_layer_norm_before": False}
RECIPE = {"tune": "qlora", "learning_rate": 1e-2, "lora_dropout": 0.0, "eval_dataset_name": "builtin:greetings"}


@pytest.fixture
def built(tmp_path) -> Built:
    return build(tmp_path, model_name_or_path=small_opt(tmp_path / "opt", **GEOMETRY), **RECIPE, bf16=True)


def test_the_base_lies_in_nf4_with_its_scales_quantised_too(built):
    four_bit = {name: m for name, m in built.model.named_modules() if isinstance(m, Linear4bit)}
    targets = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
    assert sum(".".join(name.split(".")[-2:]).startswith(targets) for name in four_bit) == 12, "two blocks of six"
    for name, module in four_bit.items():
        state = module.weight.quant_state
        assert (state.quant_type, state.nested) == ("nf4", True), name
        assert not module.weight.requires_grad
        assert module.weight.numel() * module.weight.element_size() * 2 == state.shape.numel(), "half a byte each"
    trained = [name for name, p in built.model.named_parameters() if p.requires_grad]
    assert len(trained) == 24 and all(".lora_" in name for name in trained)


def test_it_learns_quietly_and_the_adapter_loads_again_on_the_same_base(built, capfd):
    lines = built.train()
    report = save(built.start, built.trainer)
    said = capfd.readouterr()
    assert "bitsandbytes" not in said.err + said.out and "Warning" not in said.err
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0] - 0.1
    assert report is not None and report.kind == "adapter"
    in_effect = json.loads((built.run.path / "environment.json").read_text())["in_effect"]
    assert in_effect["precision"] == "bf16" and in_effect["exact_gradients"] is True
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=torch.bfloat16,
    )
    loaded = AutoPeftModelForCausalLM.from_pretrained(
        str(built.run.model),
        quantization_config=four_bit,
        dtype=torch.bfloat16,
        device_map={"": built.trainer.args.device},
    ).eval()
    total, targets = 0.0, 0
    with torch.no_grad(), torch.autocast(loaded.device.type, torch.bfloat16):
        for ids, supervised in each_document(built.trainer.plan.evaluation.documents):
            total += loss_of_document(loaded, ids, supervised).item()
            targets += int(supervised.sum())
    assert total / targets == pytest.approx(lines[-1]["eval_loss"], rel=0.01)


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_biases_learn_in_fp32_beside_matrices_that_stay_packed(tmp_path, bias):
    """bitsandbytes 0.50 casts a bias in place to the type of its layer's input; peft's layers show packed weights."""
    model = small_opt(tmp_path / "opt", **GEOMETRY)
    built = build(tmp_path, model_name_or_path=model, **RECIPE, bf16=True, bias=bias, max_steps=2)
    four_bit = {name: m for name, m in built.model.named_modules() if isinstance(m, Linear4bit)}
    packed = {name: module.weight.detach().clone() for name, module in four_bit.items()}
    biases = {name: p.detach().clone() for name, p in built.model.named_parameters() if name.endswith("bias")}
    lines = built.train()
    assert all(torch.tensor(line["loss"]).isfinite() for line in lines if line.get("loss") is not None)
    for name, module in four_bit.items():
        assert module.weight.dtype == torch.bfloat16, "the type of storage"
        assert torch.equal(module.weight.view(torch.uint8), packed[name].view(torch.uint8)), name
    trained = {name: p for name, p in built.model.named_parameters() if p.requires_grad and name.endswith("bias")}
    assert len(trained) == {"lora_only": 2 * 6, "all": 2 * 8}[bias]
    for name, parameter in trained.items():
        assert parameter.dtype == torch.float32, name
        assert name.endswith("k_proj.base_layer.bias") or not torch.equal(parameter, biases[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("precision", [{}, {"fp16": True}], ids=["fp32", "fp16"])
def test_it_learns_in_the_other_precisions(tmp_path, precision):
    model = small_opt(tmp_path / "opt", **GEOMETRY)
    lines = build(tmp_path, model_name_or_path=model, **{**RECIPE, **precision}).train()
    losses = [line["loss"] for line in lines if line.get("loss") is not None]
    assert losses[-1] < losses[0] - 0.1


def test_gradients_equal_a_naive_loop_on_the_dequantised_weights_after_the_self_test_and_an_evaluation(tmp_path):
    """bitsandbytes 0.50 lays 4-bit weights out anew when a CPU evaluates, in a form without gradients."""
    model = small_opt(tmp_path / "opt", **GEOMETRY)
    built = build(tmp_path, model_name_or_path=model, **RECIPE, max_steps=2)
    built.train()
    four_bit = {name: m for name, m in built.model.named_modules() if isinstance(m, Linear4bit)}
    assert all(module.weight.quant_state.nested for module in four_bit.values())
    plain = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager")
    plain = get_peft_model(plain, copy.deepcopy(built.model.peft_config["default"])).to(built.trainer.args.device)
    state = {name: tensor for name, tensor in built.model.state_dict().items() if ".weight." not in name}
    for name, module in four_bit.items():
        unpacked = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        state[f"{name}.weight"] = unpacked.float()
    plain.load_state_dict(state)
    step = built.trainer.plan.schedule.step(0)
    documents = list(each_document(built.trainer.plan.documents.documents))
    for microbatch in step.microbatches:
        for number in microbatch.documents:
            (loss_of_document(plain, *documents[number]) / step.supervised_tokens).backward()
    built.trainer.training_step(built.model, next(iter(built.trainer.get_train_dataloader())))
    found = {name: p.grad for name, p in built.model.named_parameters() if p.requires_grad}
    expected = {name: p.grad for name, p in plain.named_parameters() if p.requires_grad}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.norm() > 0
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_a_device_that_holds_no_4_bit_weights_is_refused_by_name(built):
    config = load_config(built.recipe)
    with pytest.raises(UserError, match=r"tune: qlora cannot run on a mps device: use tune: lora"):
        load_base_model(built.recipe, config, torch.device("mps"))


def test_a_base_stored_in_4_bits_has_gradients_beside_lora_after_an_evaluation(tmp_path):
    model = small_opt(tmp_path / "opt", **GEOMETRY)
    stored = AutoModelForCausalLM.from_pretrained(
        model, quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    )
    stored.save_pretrained(model)
    given = Recipe.from_values(
        model_name_or_path=model, dataset_name="builtin:capitals", output_dir="run", tune="lora", max_seq_length=64
    )
    base = load_base_model(given, load_config(given), torch.device("cpu"))
    packed = {name: m.weight.shape for name, m in base.named_modules() if isinstance(m, Linear4bit)}
    with torch.no_grad():
        base.eval()(input_ids=torch.arange(5, 12)[None])
    assert len(packed) >= 12
    assert packed == {name: m.weight.shape for name, m in base.named_modules() if isinstance(m, Linear4bit)}
