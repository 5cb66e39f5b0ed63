"""Parts of a base that do not fit, or are no base, are named before anything is prepared; what is not needed is not."""

import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from peft import LoraConfig, PeftModel, get_peft_model
from tests.building import small_opt
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
)

from isotune.checkpoint.export import export_run
from isotune.compat.trl import padding_token_kept
from isotune.config import ClassificationRecipe, Recipe
from isotune.data.sft.tokenization import ConversationEncoder
from isotune.evaluation.models import generation_model_named
from isotune.io.errors import UserError
from isotune.models.base.vocabulary import check_tokens
from isotune.models.opening import (
    load_config,
    load_pretrained,
    load_pretrained_config,
    load_tokenizer,
    within_positions,
)
from isotune.preflight.preflight_report import run_preflight
from isotune.preflight.request import PreflightRequest, shipped_launch
from isotune.training.from_recipe import start_run


@pytest.fixture
def base(tmp_path) -> str:
    return small_opt(tmp_path / "base")


def recipe(model, kind=Recipe, **more):
    return kind.from_values(model_name_or_path=str(model), dataset_name="builtin:capitals", output_dir="run", **more)


def make_run(folder, base, *, adapter: bool):
    """What a finished run leaves of what names its model."""
    (folder / "model").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(f"tune: {'lora' if adapter else 'full'}\nmodel_name_or_path: {base}\n")
    (folder / "checkpoints" / "step-00000002").mkdir(parents=True)
    name = "adapter_config.json" if adapter else "config.json"
    (folder / "model" / name).write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("given", "adapter", "says"),
    [
        ("", True, "is a run whose model is an adapter: `isotune export {run} --merge` merges it"),
        ("model", True, "is the adapter of the run {run}: `isotune export {run} --merge` merges it"),
        ("", False, "is a run: its model is {run}/model"),
        ("checkpoints/step-00000002", True, "a checkpoint of a run: `isotune export {run}/checkpoints/step-00000002"),
    ],
)
def test_a_run_given_as_the_base_is_named_with_the_command_that_makes_a_model(tmp_path, base, given, adapter, says):
    run = make_run(tmp_path / "run", base, adapter=adapter)
    for load in (load_config, load_tokenizer):
        with pytest.raises(UserError) as refused:
            load(recipe(run / given))
        assert says.format(run=run) in str(refused.value)
    with pytest.raises(UserError, match="--model "):
        generation_model_named(str(run / given))


def test_the_adapter_of_another_program_is_merged_by_the_command_that_is_named(tmp_path, base):
    model = AutoModelForCausalLM.from_pretrained(base)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.peft_config["default"].base_model_name_or_path = base
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match=rf"is an adapter, not a model: `isotune export {tmp_path}/adapter --merge`"):
        load_config(recipe(tmp_path / "adapter"))
    merged = export_run(tmp_path / "adapter", merge=True).folder
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    expected = expected.merge_and_unload().state_dict()
    found = AutoModelForCausalLM.from_pretrained(merged).state_dict()
    assert merged == tmp_path / "adapter" / "export" / "merged-safetensors"
    assert all((found[name] - expected[name]).abs().max() < 1e-6 for name in expected)
    assert load_config(recipe(merged, max_seq_length=64)).model_type == "opt"


@pytest.mark.parametrize("part", ["configuration", "tokenizer"])
def test_code_that_comes_with_a_model_is_refused_and_nobody_is_asked_to_run_it(tmp_path, base, monkeypatch, part):
    folder, ran = tmp_path / "theirs", tmp_path / "ran"
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    (folder / "mine.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Mine: pass\n")
    own = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine", "AutoTokenizer": ["mine.Mine", "mine.Mine"]}}
    (folder / "config.json").write_text(json.dumps(own))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Mine", **own}))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))  # whoever asks is told to go on
    load = load_config if part == "configuration" else load_tokenizer
    with pytest.raises(UserError, match="contains custom code"):
        load(recipe(folder, max_seq_length=64))
    assert not ran.exists()


def test_a_tokenizer_that_outgrew_the_embedding_is_refused_with_both_numbers(tmp_path, base):
    tokenizer, config = AutoTokenizer.from_pretrained(base), AutoConfig.from_pretrained(base)
    rows = config.vocab_size
    check_tokens(config, tokenizer, base)  # as many
    config.vocab_size = rows + 5
    check_tokens(config, tokenizer, base)  # fewer, as in OPT and Qwen
    tokenizer.add_tokens([f"<extra{number}>" for number in range(7)])
    says = f"has {rows + 7:,} tokens and the embedding of '{base}' {rows:,} rows"
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    asked = recipe(base, tokenizer_name_or_path=str(tmp_path / "tokenizer"), max_seq_length=64, microbatch_tokens=64)
    with pytest.raises(UserError) as refused:
        run_preflight(PreflightRequest(asked, shipped_launch("plain", 1), ()))
    assert says in str(refused.value)
    tokenizer.save_pretrained(base)
    with pytest.raises(UserError, match=r"has .* tokens and the embedding of"):
        generation_model_named(base)


def test_a_tokenizer_without_a_pad_token_is_taken_and_kept_so(tmp_path, base):
    file = tmp_path / "base" / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({name: value for name, value in settings.items() if name != "pad_token"}))
    for kind in (Recipe, ClassificationRecipe):
        tokenizer = load_tokenizer(recipe(base, kind))
        assert tokenizer.pad_token is None
    assert len(ConversationEncoder(tokenizer).prefix)
    model = SimpleNamespace(
        config=SimpleNamespace(pad_token_id=None), generation_config=SimpleNamespace(pad_token_id=0)
    )
    with padding_token_kept(model, tokenizer):
        tokenizer.pad_token = tokenizer.eos_token  # as TRL does
        model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.eos_token_id
    assert (tokenizer.pad_token, model.config.pad_token_id, model.generation_config.pad_token_id) == (None, None, 0)


@pytest.mark.parametrize("kind", [Recipe, ClassificationRecipe])
def test_rows_are_as_long_as_the_positions_where_nobody_says_how_long(tmp_path, kind, capsys):
    folder = small_opt(tmp_path / "short", max_position_embeddings=48)
    asked = recipe(folder, kind).with_values(output_dir=str(tmp_path / "run"))
    start = start_run(asked)
    assert start.recipe.max_seq_length == start.with_row_tokens(asked).max_seq_length == 48
    assert start.run.identity.values["max_seq_length"] == 48
    assert f"length      max_seq_length is 48: {folder} has no more positions\n" in capsys.readouterr().out
    for length in (48, 47):
        same = recipe(folder, kind, max_seq_length=length)
        assert within_positions(same, load_config(same)) is same
    for ask in (start_run, lambda given: run_preflight(PreflightRequest(given, shipped_launch("ddp", 1), ()), limit=1)):
        with pytest.raises(UserError, match=f"^max_seq_length 49 is beyond the 48 positions of '{folder}': lower max_"):
            ask(asked.with_values(max_seq_length=49))
    assert not (tmp_path / "run").exists()


def test_rows_keep_their_length_where_the_model_has_more_positions(tmp_path, base, capsys):
    assert start_run(recipe(base, max_seq_length=64)).recipe.max_seq_length == 64
    long = small_opt(tmp_path / "long", max_position_embeddings=2048)
    assert start_run(recipe(long)).recipe.max_seq_length == 1024
    assert "length  " not in capsys.readouterr().out


def test_a_model_with_an_adapter_in_it_is_refused_and_an_adapter_with_a_configuration_named(tmp_path, base):
    model = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(base)
    with pytest.raises(UserError, match="is a model with an adapter in it: merge the two, or move one away"):
        load_config(recipe(base))
    Path(base, "model.safetensors").unlink()
    with pytest.raises(UserError, match=rf"is an adapter, not a model: `isotune export {base} --merge`"):
        load_config(recipe(base))


def change_config(folder, **values):
    place = Path(folder, "config.json")
    place.write_text(json.dumps(json.loads(place.read_text()) | values))


@pytest.mark.parametrize(("key", "says"), [("ffn_dim", "another size of .*fc1"), ("vocab_size", "embed_tokens.weight")])
def test_weights_of_another_size_than_the_configuration_says_are_named(base, key, says):
    change_config(base, **{key: 40})
    with pytest.raises(UserError, match=says):
        load_pretrained(base, auto=AutoModelForCausalLM)


def test_a_head_of_other_classes_than_the_configuration_says_is_refused(tmp_path):
    config = BertConfig(
        vocab_size=96, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=3
    )
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    change_config(tmp_path, id2label={"0": "a", "1": "b"}, label2id={"a": 0, "b": 1})
    for may_lack in ((), ("classifier",)):
        with pytest.raises(UserError, match=r"another size of classifier\."):
            load_pretrained(str(tmp_path), auto=AutoModelForSequenceClassification, may_lack=may_lack)
    change_config(tmp_path, id2label={"1": "a", "2": "b", "3": "c"}, label2id={"a": 1, "b": 2, "c": 3})
    with pytest.raises(UserError, match=r"id2label in config.json .* must number its classes from 0 on"):
        load_pretrained_config(str(tmp_path))


def test_what_the_configuration_leaves_out_of_the_blocks_is_named(base, capsys):
    load_pretrained(base, auto=AutoModelForCausalLM)
    assert capsys.readouterr().err == ""
    layers = json.loads(Path(base, "config.json").read_text())["num_hidden_layers"]
    change_config(base, num_hidden_layers=layers - 1)
    load_pretrained(base, auto=AutoModelForCausalLM)
    said = capsys.readouterr().err
    assert f"hold 16 tensors that its config.json leaves out, model.decoder.layers.{layers - 1}.fc1.bias first" in said


FOUR_BIT = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.mark.parametrize(
    ("stored", "values", "says"),
    [
        (FOUR_BIT, {"tune": "full"}, "tune: full trains every weight: say tune: lora"),
        ({"quant_method": "gptq", "bits": 4}, {"tune": "qlora"}, "tune: qlora trains over 4 bits of bitsandbytes"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, {"tune": "qlora"}, "in 8 bits"),
        (FOUR_BIT | {"bnb_4bit_quant_type": "fp4"}, {"tune": "qlora"}, "say bnb_4bit_quant_type: fp4"),
        (FOUR_BIT, {"tune": "qlora"}, None),
        (FOUR_BIT, {"tune": "lora"}, None),
    ],
)
def test_a_quantized_base_is_trained_as_the_recipe_says_or_refused(base, stored, values, says):
    change_config(base, quantization_config=stored)
    given = recipe(base, max_seq_length=64, **values)
    if says is None:
        assert load_config(given).model_type == "opt"
        return
    with pytest.raises(UserError, match=says):
        load_config(given)


@pytest.mark.parametrize(
    "stored",
    [
        {"quant_method": "gptq", "bits": 4, "group_size": 128},
        {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True},
        {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}},
    ],
    ids=lambda stored: stored["quant_method"],
)
def test_a_base_whose_quantization_needs_another_library_is_one_sentence(base, stored):
    change_config(base, quantization_config=stored)
    with pytest.raises(UserError, match=r"the weights of .* cannot be loaded: "):
        load_pretrained(base, auto=AutoModelForCausalLM)
