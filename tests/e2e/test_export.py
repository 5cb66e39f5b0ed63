"""An exported model is the model that was trained: tensor by tensor, logit by logit, in every format."""

import contextlib
import json
import math
import os
import re
import resource
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tests.launching import run_command
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, OPTConfig, OPTForCausalLM

from isotune.checkpoint.export import export_run
from isotune.cli import main
from isotune.io.errors import UserError
from isotune.models.base.builtin import builtin_tokenizer
from isotune.models.finished_run import compare_logits, read_run

TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
RANK, ALPHA = 4, 12


@pytest.fixture(scope="module")
def tokenizer():
    return builtin_tokenizer("builtin:opt-tiny")


@pytest.fixture(scope="module")
def base(tokenizer, tmp_path_factory) -> Path:
    """A random OPT with a projected, tied embedding, as a user's local model; 4-bit CPU products want widths of 64."""
    folder = tmp_path_factory.mktemp("models") / "base"
    torch.manual_seed(0)
    geometry = {"hidden_size": 128, "word_embed_proj_dim": 64, "ffn_dim": 128, "num_hidden_layers": 2}
    model = OPTForCausalLM(
        OPTConfig(
            vocab_size=len(tokenizer), num_attention_heads=4, max_position_embeddings=80, init_std=0.1, **geometry
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_run(folder: Path, base: Path, tune: str, tokenizer, *, scale: float = 0.1, **settings) -> Path:
    """A finished run as training leaves it; adapters get random numbers in both matrices."""
    folder.mkdir(parents=True)
    recipe = {"model_name_or_path": str(base), "model_init": "pretrained", "tune": tune, **settings}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    model = AutoModelForCausalLM.from_pretrained(base)
    if tune != "full":
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=scale)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder


@pytest.fixture(scope="module")
def lora_run(base, tokenizer, tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("lora") / "run", base, "lora", tokenizer)


@pytest.fixture(scope="module")
def full_run(base, tokenizer, tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("full") / "run", base, "full", tokenizer)


def merged_by_hand(base_weights: dict, run: Path) -> dict:
    """W + alpha / r * B @ A from the files alone, in float64."""
    adapter = load_file(run / "model" / "adapter_model.safetensors")
    merged = dict(base_weights)
    touched = 0
    for name, a in adapter.items():
        if name.endswith("lora_A.weight"):
            target = name.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
            b = adapter[name.replace("lora_A", "lora_B")]
            merged[target] = (merged[target].double() + ALPHA / RANK * b.double() @ a.double()).float()
            touched += 1
    assert touched == 2 * len(TARGETS)
    return merged


def assert_merged(found: dict, wanted: dict, base_weights: dict) -> None:
    for name, tensor in wanted.items():
        assert torch.allclose(found[name], tensor, rtol=1e-6, atol=1e-6), name
        if torch.equal(tensor, base_weights[name]):
            assert torch.equal(found[name], tensor), f"{name} was not adapted and changed"


def real_tokens(shared_data, tokenizer) -> torch.Tensor:
    row = json.loads((shared_data / "guanaco" / "test.jsonl").read_text("utf-8").splitlines()[0])
    return torch.tensor([tokenizer(row["text"]).input_ids[:70]])


def logits(model, tokens) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=tokens).logits.float()


def isotune(*arguments):
    return run_command([sys.executable, "-m", "isotune.cli", *map(str, arguments)], timeout_seconds=120)


def test_a_merged_folder_holds_base_plus_scaled_product_and_loads_as_a_stock_model(lora_run, base, tmp_path):
    done = export_run(lora_run, merge=True, output=tmp_path / "out")

    weights = load_file(tmp_path / "out" / "model.safetensors")
    base_weights = load_file(base / "model.safetensors")
    assert weights.keys() == base_weights.keys()
    assert_merged(weights, merged_by_hand(base_weights, lora_run), base_weights)
    model, loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(model) is OPTForCausalLM
    assert not loaded["missing_keys"] | loaded["unexpected_keys"]
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight
    assert done.kind == "model"


def test_the_merged_model_answers_as_the_adapter_model_on_real_text(lora_run, base, tmp_path, shared_data, tokenizer):
    done = export_run(lora_run, merge=True, output=tmp_path / "out")
    tokens = real_tokens(shared_data, tokenizer)

    plain = AutoModelForCausalLM.from_pretrained(base)
    unadapted = logits(plain, tokens)
    adapted = logits(PeftModel.from_pretrained(plain, str(lora_run / "model")), tokens)
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), tokens)

    assert (adapted - unadapted).abs().max() > 0.1 * adapted.abs().max()  # else any merge would pass
    assert (merged - adapted).abs().max() <= done.parity.tolerance
    assert 0 < done.parity.largest_difference <= 1e-5 * done.parity.largest_logit


def test_a_state_dict_loads_without_pickle_into_a_model_made_from_the_configuration(lora_run, base, tmp_path):
    export_run(lora_run, merge=True, format="pt", output=tmp_path / "out")

    state = torch.load(tmp_path / "out" / "model.pt", weights_only=True)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "out"))
    result = model.load_state_dict(state, strict=True)

    assert not result.missing_keys
    assert not result.unexpected_keys
    base_weights = load_file(base / "model.safetensors")
    assert_merged(state, merged_by_hand(base_weights, lora_run), base_weights)
    assert torch.equal(model.lm_head.weight, state["model.decoder.embed_tokens.weight"])
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token_id == 2


def test_tied_weights_lie_in_the_state_dict_once(lora_run, tmp_path):
    export_run(lora_run, merge=True, format="pt", output=tmp_path / "out")
    state = torch.load(tmp_path / "out" / "model.pt", weights_only=True)
    assert state["lm_head.weight"].data_ptr() == state["model.decoder.embed_tokens.weight"].data_ptr()
    distinct = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in state.values()}
    assert (tmp_path / "out" / "model.pt").stat().st_size < 1.1 * sum(distinct.values())


@pytest.mark.parametrize("format", ["safetensors", "pt"])
def test_a_whole_model_is_exported_bit_for_bit(full_run, tmp_path, format):
    done = export_run(full_run, merge=False, format=format, output=tmp_path / "out")
    trained = AutoModelForCausalLM.from_pretrained(full_run / "model").state_dict()
    if format == "pt":
        found = torch.load(tmp_path / "out" / "model.pt", weights_only=True)
    else:
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert found.keys() == trained.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in trained.items())
    assert done.parity is None


def test_without_merge_the_adapter_is_copied_and_still_finds_its_base(lora_run, base, tmp_path):
    export_run(lora_run, merge=False, output=tmp_path / "out")
    copied = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    assert copied == (lora_run / "model" / "adapter_model.safetensors").read_bytes()
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(base.resolve())
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_the_base_that_the_run_wrote_is_used_even_after_the_run_has_moved(lora_run, base, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(lora_run, moved)
    shutil.copytree(base, moved / "base_model")
    config = moved / "model" / "adapter_config.json"
    settings = {**json.loads(config.read_text()), "base_model_name_or_path": "/gone/base_model"}
    config.write_text(json.dumps(settings))

    export_run(moved, merge=True)

    base_weights = load_file(base / "model.safetensors")
    found = load_file(moved / "export" / "merged-safetensors" / "model.safetensors")
    assert_merged(found, merged_by_hand(base_weights, moved), base_weights)


def test_a_run_in_bf16_is_merged_in_fp32_and_rounded_once(base, tokenizer, tmp_path):
    run = make_run(tmp_path / "run", base, "lora", tokenizer, bf16=True)
    done = export_run(run, merge=True, output=tmp_path / "out")
    rounded = {name: w.bfloat16().float() for name, w in load_file(base / "model.safetensors").items()}
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in merged_by_hand(rounded, run).items():
        assert found[name].dtype == torch.bfloat16
        assert torch.allclose(found[name].float(), tensor, rtol=2**-8, atol=1e-7), name
    assert 1e-5 * done.parity.largest_logit < done.parity.largest_difference <= done.parity.tolerance

    exact = export_run(run, merge=True, output=tmp_path / "exact", dtype="float32")
    assert exact.parity.largest_difference < 1e-5 * exact.parity.largest_logit


def test_a_run_in_four_bits_is_merged_into_the_numbers_that_it_was_trained_on(base, tokenizer, tmp_path, shared_data):
    pytest.importorskip("bitsandbytes")
    run = make_run(tmp_path / "run", base, "qlora", tokenizer, bf16=False)
    export_run(run, merge=True, output=tmp_path / "out")

    four_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    trained_on = AutoModelForCausalLM.from_pretrained(base, quantization_config=four_bits, device_map={"": "cpu"})
    adapted = logits(
        PeftModel.from_pretrained(trained_on, str(run / "model")), tokens := real_tokens(shared_data, tokenizer)
    )
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    on_full_precision = AutoModelForCausalLM.from_pretrained(base)
    unquantised = logits(PeftModel.from_pretrained(on_full_precision, str(run / "model")), tokens)

    assert getattr(merged.config, "quantization_config", None) is None
    to_trained = (logits(merged, tokens) - adapted).abs().mean()
    assert to_trained < 0.1 * (unquantised - adapted).abs().mean()  # what is left is the 4-bit kernel's own rounding


def test_a_merge_beyond_the_tolerance_is_refused_with_its_figure_and_writes_nothing(
    base, tokenizer, tmp_path, monkeypatch
):
    run = make_run(tmp_path / "run", base, "lora", tokenizer)
    monkeypatch.setattr("isotune.models.finished_run.PARITY_TOLERANCE", {torch.float32: 1e-12})
    with pytest.raises(UserError, match=r"is not the adapter model \(parity: largest absolute logit difference"):
        export_run(run, merge=True, output=tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_parity_is_the_largest_absolute_difference_and_never_holds_with_nan():
    wanted, found = torch.tensor([[1.0, -8.0]]), torch.tensor([[1.25, -7.5]])
    parity = compare_logits(wanted, found, relative_tolerance=0.1)
    assert (parity.largest_difference, parity.largest_logit) == (0.5, 8.0)
    moved = compare_logits(torch.tensor([[1.0, 3.0], [2.0, 0.0]]), torch.tensor([[3.0, 1.0], [2.0, 1.0]]), 1.0)
    assert (moved.equal, moved.compared) == (1, 2)
    assert str(moved).endswith("; the likeliest token or class is the same at 1 of 2 places")
    assert parity.tolerance == pytest.approx(0.8)
    assert parity.holds
    assert not compare_logits(wanted, torch.tensor([[1.0, -7.0]]), relative_tolerance=0.1).holds
    assert not compare_logits(wanted, torch.tensor([[1.0, math.nan]]), relative_tolerance=0.1).holds


def test_an_adapter_with_nan_is_refused(base, tokenizer, tmp_path):
    run = make_run(tmp_path / "run", base, "lora", tokenizer)
    file = run / "model" / "adapter_model.safetensors"
    weights = load_file(file)
    next(iter(weights.values()))[0, 0] = math.nan
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"cannot be merged|not finite"):
        export_run(run, merge=True, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("format", "file"), [pytest.param("pt", "model.pt", marks=pytest.mark.slow), ("safetensors", "")]
)
def test_the_command_prints_the_parity_figure_and_where_the_model_lies(lora_run, tmp_path, format, file):
    done = isotune("export", lora_run, "--merge", "--format", format, "--output", tmp_path / "out")
    assert (done.returncode, done.stderr) == (0, "")
    figure = re.search(r"largest absolute logit difference (\S+) \(tolerance (\S+),", done.stdout)
    assert float(figure[1]) < float(figure[2])
    assert done.stdout.endswith(f"wrote the model to {tmp_path / 'out' / file}\n")


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 100)


def no_run(folder: Path) -> str:
    shutil.rmtree(folder)
    return str(folder)


def no_recipe(folder: Path) -> str:
    (folder / "recipe.yaml").unlink()
    return "recipe.yaml"


def no_model(folder: Path) -> str:
    shutil.rmtree(folder / "model")
    return str(folder / "model")


def truncated_adapter(folder: Path) -> str:
    truncate(folder / "model" / "adapter_model.safetensors")
    return str(folder / "model" / "adapter_model.safetensors")


def truncated_base(folder: Path) -> str:
    truncate(folder / "base_model" / "model.safetensors")
    return str(folder / "base_model" / "model.safetensors")


def pickled_adapter(folder: Path) -> str:
    file = folder / "model" / "adapter_model.safetensors"
    torch.save(load_file(file), folder / "model" / "adapter_model.bin")
    file.unlink()
    return "adapter_model.safetensors"


def no_base(folder: Path) -> str:
    shutil.rmtree(folder / "base_model")
    config = folder / "model" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "/gone/base"}))
    return "/gone/base"


def broken_recipe(folder: Path) -> str:
    (folder / "recipe.yaml").write_text("tune: [lora")
    return "recipe.yaml"


def output_in_use(folder: Path) -> str:
    (folder.parent / "out").mkdir()
    (folder.parent / "out" / "precious.txt").write_text("mine")
    return str(folder.parent / "out")


BREAKAGES = [
    no_run,
    no_recipe,
    no_model,
    truncated_adapter,
    truncated_base,
    pickled_adapter,
    no_base,
    broken_recipe,
    output_in_use,
]


@pytest.mark.parametrize("damage", BREAKAGES, ids=lambda damage: damage.__name__)
def test_what_cannot_be_exported_is_named_and_nothing_is_written(lora_run, base, tmp_path, damage):
    run = tmp_path / "run"
    shutil.copytree(lora_run, run)
    shutil.copytree(base, run / "base_model")
    named = damage(run)
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    with pytest.raises(UserError) as mistake:
        export_run(run, merge=True, output=tmp_path / "out")
    assert named in str(mistake.value)
    assert "\n" not in str(mistake.value)
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"merge": True, "format": "tflite"}, "--format tflite"),
        ({"merge": False, "format": "pt"}, "add --merge"),
        ({"merge": True, "dtype": "int8"}, "--dtype int8"),
        ({"merge": False, "dtype": "float16"}, "--dtype is for merged weights"),
    ],
)
def test_what_makes_no_sense_is_refused(lora_run, tmp_path, asked, says):
    with pytest.raises(UserError, match=says):
        export_run(lora_run, output=tmp_path / "out", **asked)


def test_a_linked_folder_is_filled_and_stays_a_link(lora_run, full_run, tmp_path):
    disk, link = tmp_path / "disk", tmp_path / "link"
    (disk / "empty").mkdir(parents=True)
    link.symlink_to(disk / "empty")
    assert export_run(lora_run, merge=False, output=link).folder == disk / "empty"
    run, linked = tmp_path / "run", tmp_path / "run" / "export" / "model-safetensors"
    shutil.copytree(full_run, run)
    linked.parent.mkdir()
    linked.symlink_to(disk / "absent")
    export_run(run, merge=False)
    assert link.is_symlink() and linked.is_symlink()
    assert sorted(path.name for path in disk.iterdir()) == ["absent", "empty"]
    assert load_file(linked / "model.safetensors").keys() == load_file(full_run / "model/model.safetensors").keys()
    assert sorted(path.name for path in linked.parent.iterdir()) == ["model-safetensors"]


@pytest.mark.parametrize("what", ["the folder that this command runs in", "a mount point"])
@pytest.mark.parametrize("link", [False, True])
def test_a_folder_that_cannot_be_replaced_is_refused_before_anything_is_read(tmp_path, monkeypatch, what, link):
    folder = tmp_path / "here"
    folder.mkdir()
    if what == "a mount point":
        monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == folder)
    else:
        monkeypatch.chdir(folder)
    output: Path | str = "." if what != "a mount point" else folder
    if link:
        output = tmp_path / "link"
        output.symlink_to(folder)
    with pytest.raises(UserError) as mistake:
        export_run(tmp_path / "none", merge=True, output=output)
    assert str(mistake.value) == f"--output {folder} is {what}: name a folder inside it"


def test_a_truncated_file_is_one_sentence_and_exit_status_2(lora_run, tmp_path):
    shutil.copytree(lora_run, tmp_path / "run")
    file = tmp_path / "run" / "model" / "adapter_model.safetensors"
    truncate(file)
    done = isotune("export", tmp_path / "run", "--merge")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(f"error: {file} is not a complete safetensors file")


@contextlib.contextmanager
def small_files() -> Iterator[None]:
    """This process can write no file above 0.5 MB, as on a disk without room; Python ignores the signal for it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("format", ["safetensors", "pt"])
def test_a_disk_without_room_is_one_sentence_and_leaves_nothing(full_run, tmp_path, capsys, format):
    with small_files(), pytest.raises(SystemExit) as left:
        main(["export", str(full_run), "--format", format, "--output", str(tmp_path / "out")])
    printed = capsys.readouterr()
    assert (left.value.code, printed.err.count("\n")) == (2, 1), printed.err
    assert f"no room on the disk for the model in {tmp_path / 'out'}" in printed.err
    assert list(tmp_path.iterdir()) == []


def test_a_run_says_what_it_is(lora_run, full_run, base):
    assert (read_run(lora_run).base, read_run(lora_run).base_made_here) == (str(base), False)
    assert read_run(full_run).is_adapter is False
