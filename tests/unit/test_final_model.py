"""A final model is saved when what lies on the disk was read back equal, and not before."""

import json
import resource
import signal
import sys
import types

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tests.launching import run_command
from transformers import AutoModelForCausalLM, AutoTokenizer, OPTConfig

from isotune.checkpoint.final_model import replace_folder, save_and_verify
from isotune.io.errors import RunFault, UserError


@pytest.fixture(scope="module")
def tokenizer(shared_data):
    return AutoTokenizer.from_pretrained(shared_data / "tokenizers" / "opt")


def tiny_opt(dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=50_272,
        hidden_size=32,
        word_embed_proj_dim=16,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
    )
    return AutoModelForCausalLM.from_config(config).to(dtype)


def with_adapter(base):
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "fc1"], task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return adapted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_model_has_the_bits_of_the_one_in_memory(tmp_path, tokenizer, dtype):
    model = tiny_opt(dtype)
    report = save_and_verify(model, tokenizer, tmp_path / "model")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    assert reloaded.dtype == dtype
    for name, tensor in model.state_dict().items():
        assert torch.equal(reloaded.state_dict()[name], tensor), name
    assert reloaded.lm_head.weight is reloaded.model.decoder.embed_tokens.weight
    assert report.kind == "model"
    assert report.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert report.dtypes == (str(dtype).removeprefix("torch."),)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_what_training_put_on_the_model_does_not_reach_the_folder(tmp_path, tokenizer):
    model = tiny_opt()
    model.config._attn_implementation = "packed"
    model.config.use_cache = False
    model.forward = types.MethodType(lambda self, **_: 1 / 0, model)
    save_and_verify(model, tokenizer, tmp_path / "model")
    saved = json.loads((tmp_path / "model" / "config.json").read_text())
    assert "packed" not in json.dumps(saved)
    assert saved["use_cache"] is True
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    logits = reloaded(torch.tensor([[2, 100, 200]])).logits
    assert torch.isfinite(logits).all()
    assert model.config.use_cache is False, "the model in memory is left as it was"


def test_a_published_generation_config_that_is_invalid_is_saved_as_it_is(tmp_path, tokenizer):
    model = tiny_opt()
    model.generation_config.temperature = 0.7  # without do_sample, as some bases are published
    model.generation_config.pad_token_id = 7  # as Trainer does
    save_and_verify(model, tokenizer, tmp_path / "model")
    saved = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert (saved["temperature"], saved["pad_token_id"], saved["eos_token_id"]) == (0.7, 7, 2)
    assert model.generation_config.temperature == 0.7


def test_a_saved_adapter_loads_by_peft_with_the_same_logits(tmp_path, tokenizer):
    adapted = with_adapter(tiny_opt()).eval()
    report = save_and_verify(adapted, tokenizer, tmp_path / "model")
    reloaded = PeftModel.from_pretrained(tiny_opt(), tmp_path / "model").eval()
    tokens = torch.tensor([[2, 100, 200, 300]])
    assert torch.equal(reloaded(tokens).logits, adapted(tokens).logits)
    assert report.kind == "adapter"
    assert report.tensors == len(load_file(tmp_path / "model" / "adapter_model.safetensors")) == 8


@pytest.mark.parametrize(
    "more",
    [
        pytest.param({"bias": "lora_only"}, marks=pytest.mark.slow),
        {"bias": "all", "modules_to_save": ["project_out"]},
        {"use_dora": True},
    ],
    ids=str,
)
def test_an_adapter_with_more_than_low_rank_matrices_is_saved_whole(tmp_path, tokenizer, more):
    config = LoraConfig(r=2, target_modules=["q_proj", "fc2"], task_type="CAUSAL_LM", **more)
    adapted = get_peft_model(tiny_opt(), config).eval()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    save_and_verify(adapted, tokenizer, tmp_path / "model")
    reloaded = PeftModel.from_pretrained(tiny_opt(), tmp_path / "model").eval()
    tokens = torch.tensor([[2, 100, 200, 300]])
    assert torch.equal(reloaded(tokens).logits, adapted(tokens).logits)


def test_an_empty_tensor_is_refused_and_the_older_model_stays(tmp_path, tokenizer):
    older = tiny_opt()
    save_and_verify(older, tokenizer, tmp_path / "model")
    adapted = with_adapter(tiny_opt())
    layer = adapted.base_model.model.model.decoder.layers[0].self_attn.q_proj
    layer.lora_A["default"].weight = torch.nn.Parameter(torch.empty(0))
    with pytest.raises(RunFault, match=r"layers.0.self_attn.q_proj.lora_A.default.weight is empty"):
        save_and_verify(adapted, tokenizer, tmp_path / "model")
    kept = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(kept.lm_head.weight, older.lm_head.weight)


def test_a_writer_that_loses_a_number_is_caught(tmp_path, tokenizer):
    model = tiny_opt()
    stock_save = model.save_pretrained

    def lossy_save(folder):
        original = model.model.decoder.project_in.weight.data
        model.model.decoder.project_in.weight.data = original + 1e-7 * original.abs().max()
        stock_save(folder)
        model.model.decoder.project_in.weight.data = original

    model.save_pretrained = lossy_save
    with pytest.raises(RunFault, match=r"project_in.weight has other values"):
        save_and_verify(model, tokenizer, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_newer_model_replaces_the_older_one_with_nothing_left_over(tmp_path, tokenizer):
    save_and_verify(with_adapter(tiny_opt()), tokenizer, tmp_path / "model")
    save_and_verify(tiny_opt(), tokenizer, tmp_path / "model")
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert "model.safetensors" in names
    assert not any(name.startswith("adapter_") for name in names)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def save_with_a_small_file_limit(folder, tokenizer_folder) -> None:
    """Runs in a process of its own: no file may grow beyond 100 kB, as on a disk or a quota without room."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        save_and_verify(tiny_opt(), AutoTokenizer.from_pretrained(tokenizer_folder), folder)
    except UserError as error:
        print(f"UserError: {error}")


def test_a_disk_without_room_is_one_sentence_and_leaves_nothing(tmp_path, shared_data):
    call = (
        "from pathlib import Path; from tests.unit.test_final_model import save_with_a_small_file_limit as run; "
        f"run(Path({str(tmp_path / 'run' / 'model')!r}), {str(shared_data / 'tokenizers' / 'opt')!r})"
    )
    found = run_command([sys.executable, "-c", call])
    assert found.returncode == 0, found.stderr
    assert f"UserError: no room on the disk for the model in {tmp_path / 'run' / 'model'}" in found.stdout
    assert list((tmp_path / "run").iterdir()) == []


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path, tokenizer):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written"):
        save_and_verify(tiny_opt(), tokenizer, tmp_path / "file" / "model")


def test_a_folder_that_cannot_take_its_name_is_one_sentence(tmp_path):
    staging = tmp_path / "out.unverified"
    staging.mkdir()
    with pytest.raises(UserError) as mistake:  # no folder can be renamed into itself
        replace_folder(staging, staging / "out")
    assert str(mistake.value) == f"the model cannot be written to {staging / 'out'}: Invalid argument"
