"""Adapters that start from the base's own weights: the right part, the same in every launch, saved and merged."""

import numpy as np
import pytest
import torch
import yaml
from tests.building import build, small_opt
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from isotune.checkpoint.engine_state import plain_model
from isotune.checkpoint.export import export_run
from isotune.checkpoint.final_model import save_and_verify
from isotune.config import Recipe
from isotune.io.errors import UserError
from isotune.models.adapters.lora import add_adapters
from isotune.models.base.builtin import builtin_tokenizer
from isotune.models.finished_run import merge_run, read_run
from isotune.models.opening import load_base_model, load_config
from isotune.training.from_recipe import save

GIVEN = {"dataset_name": "builtin:capitals", "output_dir": "run", "model_name_or_path": "builtin:opt-tiny"}
LAYER = "base_model.model.model.decoder.layers.1.fc1"


def recipe(**values):
    return Recipe.from_values(**{**GIVEN, "tune": "lora", "r": 4, **values})


def gpt2(folder):
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256, "initializer_range": 0.1}
    tokenizer = builtin_tokenizer("builtin:opt-tiny")
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    return str(folder)


def logits(model, tokens):
    with torch.no_grad():
        return model.eval()(tokens).logits


@pytest.fixture(scope="module")
def opt(tmp_path_factory) -> str:
    return small_opt(tmp_path_factory.mktemp("opt"))


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_400", "olora"])
def test_the_start_is_the_part_of_the_base_that_its_paper_says_and_changes_no_output(opt, start):
    base = AutoModelForCausalLM.from_pretrained(opt)
    weight = base.model.decoder.layers[1].fc1.weight.detach().double().numpy()
    tokens = torch.randint(100, (2, 24))
    before = logits(base, tokens)
    adapted = add_adapters(base, recipe(init_lora_weights=start, lora_alpha=12))
    assert (logits(adapted, tokens) - before).abs().max() < 2e-6 * before.abs().max()
    layer = adapted.get_submodule(LAYER)
    taken = 3.0 * (layer.lora_B.default.weight @ layer.lora_A.default.weight).detach().double().numpy()
    u, s, v = np.linalg.svd(weight)
    q, r = np.linalg.qr(weight)
    # PiSSA: the largest singular values, with the scale divided out; OLoRA: the first columns of Q, with the scale on
    expected = 3.0 * q[:, :4] @ r[:4] if start == "olora" else u[:, :4] @ np.diag(s[:4]) @ v[:4]
    assert np.abs(taken - expected).max() < (1e-2 if "niter" in start else 1e-5) * np.abs(weight).max()
    rest = layer.base_layer.weight.detach().double().numpy()
    assert np.abs(rest + taken - weight).max() < 1e-6
    assert not layer.base_layer.weight.requires_grad and layer.lora_A.default.weight.requires_grad


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "gaussian", "orthogonal"])
def test_its_bits_depend_neither_on_threads_nor_on_what_was_drawn_before(tmp_path, start):
    path = small_opt(tmp_path, hidden_size=192, ffn_dim=768, num_hidden_layers=1, word_embed_proj_dim=192)
    found, threads = [], torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        torch.randn(count)
        made = add_adapters(AutoModelForCausalLM.from_pretrained(path), recipe(init_lora_weights=start))
        found.append({name: p.detach().clone() for name, p in made.named_parameters()})
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


COMBINED = [
    {"init_lora_weights": "pissa"},
    {"init_lora_weights": "olora", "use_rslora": True, "lora_alpha": 6},
    {"init_lora_weights": "pissa", "use_dora": True, "bias": "lora_only"},
    {"init_lora_weights": "pissa", "use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"fc1": 5}},
    {"init_lora_weights": "pissa_niter_4", "modules_to_save": ["final_layer_norm"], "layers_to_transform": [1]},
]


@pytest.mark.parametrize("values", COMBINED, ids=str)
def test_the_saved_adapter_fits_the_base_as_it_is_published_and_merges_exactly(tmp_path, opt, values):
    check_saved(tmp_path, opt, values)


def test_so_it_does_on_conv1d(tmp_path):
    check_saved(tmp_path, gpt2(tmp_path / "base"), {"init_lora_weights": "pissa"})


def check_saved(folder, base, values):
    model = add_adapters(AutoModelForCausalLM.from_pretrained(base), recipe(lora_dropout=0.0, **values))
    torch.manual_seed(3)
    with torch.no_grad():  # as if trained
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    model.peft_config["default"].base_model_name_or_path = base
    tokenizer, tokens = builtin_tokenizer("builtin:opt-tiny"), torch.randint(100, (2, 24))
    trained = logits(model, tokens)
    save_and_verify(plain_model(model, keep=True), tokenizer, folder / "run" / "model")
    assert torch.equal(logits(model, tokens), trained), "saving changed the model that trains on"
    (folder / "run" / "recipe.yaml").write_text(yaml.safe_dump({"tune": "lora", "bf16": False}))
    merged, _, parity = merge_run(read_run(folder / "run"))
    assert parity.holds and parity.largest_difference < 1e-5 * parity.largest_logit
    assert (logits(merged, tokens) - trained).abs().max() < 1e-5 * trained.abs().max()
    plain = AutoModelForCausalLM.from_pretrained(base)
    assert (logits(plain, tokens) - trained).abs().max() > 1e-3 * trained.abs().max()


@pytest.mark.parametrize(
    ("start", "says"),
    [
        ("loftq", "loftq puts rounded weights in the base's place"),
        ("eva", "eva reads activations of the data"),
        ("corda", "corda reads activations"),
        ("lora_ga", "lora_ga reads gradients"),
        ("mica", "mica freezes a half"),
        ("pissa_niter_x", "it takes true, false, gaussian, orthogonal, pissa, olora or pissa_niter_N"),
        (3, "it takes true"),
    ],
)
def test_other_starts_of_peft_are_refused_in_one_sentence(start, says):
    with pytest.raises(UserError, match=says):
        recipe(init_lora_weights=start)


def test_what_cannot_start_so_is_refused(tmp_path, opt):
    with pytest.raises(UserError, match=r"olora has no form for Conv1D"):
        add_adapters(GPT2LMHeadModel.from_pretrained(gpt2(tmp_path)), recipe(init_lora_weights="olora"))
    with pytest.raises(UserError, match=r"pissa has no rank of 33 where model.decoder.* has a side of 32: lower r"):
        add_adapters(AutoModelForCausalLM.from_pretrained(opt), recipe(init_lora_weights="pissa", r=33))


def test_a_base_in_4_bits_is_refused(tmp_path):
    pytest.importorskip("bitsandbytes")
    path = small_opt(tmp_path, hidden_size=128, word_embed_proj_dim=64, ffn_dim=128, do_layer_norm_before=False)
    asked = recipe(init_lora_weights="pissa", tune="qlora", model_name_or_path=path, max_seq_length=64)
    with pytest.raises(UserError, match="rounding it to 4 bits again"):
        add_adapters(load_base_model(asked, load_config(asked), torch.device("cpu")), asked)


def test_a_run_goes_on_to_the_same_bits_and_both_its_model_and_its_checkpoint_merge_exactly(tmp_path, opt):
    values = {"tune": "lora", "model_name_or_path": opt, "init_lora_weights": "pissa", "learning_rate": 1e-2}
    values |= {"max_steps": 4, "save_steps": 2, "save_total_limit": 9, "lora_dropout": 0.1, "max_seq_length": 128}
    whole = build(tmp_path / "whole", **values)
    lines = [line["loss"] for line in whole.train() if "loss" in line]
    save(whole.start, whole.trainer)
    resumed = build(tmp_path / "again", **values, resume=str(whole.run.path / "checkpoints" / "step-00000002"))
    assert [line["loss"] for line in resumed.train() if "loss" in line] == lines
    trained = dict(whole.model.named_parameters())
    assert all(torch.equal(p, trained[name]) for name, p in resumed.model.named_parameters())
    tokens = torch.randint(100, (1, 24))
    with torch.no_grad():
        expected = whole.model.eval()(input_ids=tokens, use_cache=False).logits
    for source in (whole.run.path, whole.run.path / "checkpoints" / "step-00000004"):
        done = export_run(source, merge=True, output=tmp_path / source.name)
        assert done.parity is not None and done.parity.largest_difference < 1e-5 * done.parity.largest_logit
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / source.name)
        assert (logits(merged, tokens) - expected).abs().max() < 1e-5 * expected.abs().max()
