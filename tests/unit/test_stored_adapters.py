"""What an adapter's files may ask for: their own base, as the recipe names it, rows that exist, and no code."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.building import small_opt
from transformers import AutoModelForCausalLM

from isotune.io.errors import UserError
from isotune.models import finished_run
from isotune.models.adapters.stored import brought_rows, find_base, read_adapter_config
from isotune.models.base.builtin import builtin_tokenizer
from isotune.models.finished_run import FinishedRun, is_classifier, read_run


def made(folder: Path, recipe: dict[str, Any] | None, config: Any) -> Path:
    """A run with an adapter, up to its weights."""
    (folder / "model").mkdir(parents=True)
    if recipe is not None:
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    text = config if isinstance(config, str) else json.dumps({"peft_type": "LORA", **config})
    (folder / "model" / "adapter_config.json").write_text(text)
    return folder


def base_of(folder: Path, recipe: dict[str, Any], config: dict[str, Any]) -> tuple[str, bool]:
    return find_base(made(folder, recipe, config), folder / "model", recipe)


def test_the_base_is_what_the_recipe_names_wherever_the_user_has_put_it(tmp_path, monkeypatch):
    (tmp_path / "mine" / "base").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    whole = str(tmp_path / "mine" / "base")
    for number, (asked, named, found) in enumerate([
        ("org/model", "org/model", "org/model"), ("org/model", None, "org/model"), (whole, whole, whole),
        ("mine/base", whole, whole), ("../" + tmp_path.name + "/mine/base", whole, whole),
        ("link/base", whole, whole), (whole, "mine/base", "mine/base"), (None, whole, whole), (None, "org/m", "org/m"),
    ]):  # fmt: skip
        recipe = {} if asked is None else {"model_name_or_path": asked}
        assert base_of(tmp_path / str(number), recipe, {"base_model_name_or_path": named}) == (found, False)
    drawn = {"model_name_or_path": "org/model", "model_init": "random"}
    (tmp_path / "base_model").mkdir()
    own = {"base_model_name_or_path": str(tmp_path / "base_model")}
    assert base_of(tmp_path / "drawn", drawn, own) == (own["base_model_name_or_path"], False)
    (tmp_path / "moved" / "base_model").mkdir(parents=True)
    gone = {"base_model_name_or_path": "/gone/base_model"}
    assert base_of(tmp_path / "moved", drawn, gone) == (str(tmp_path / "moved" / "base_model"), True)


@pytest.mark.parametrize(
    ("recipe", "config", "says"),
    [
        ({"model_name_or_path": "org/model"}, {"base_model_name_or_path": "evil/model"}, "say the same in both"),
        ({"model_name_or_path": "org/model"}, {"base_model_name_or_path": "../../private"}, "say the same in both"),
        ({"model_name_or_path": "org/model"}, {"base_model_name_or_path": "/tmp"}, "say the same in both"),
        ({"model_name_or_path": "/gone"}, {"base_model_name_or_path": "/gone"}, "is not where it was"),
        ({"tune": "lora"}, {"base_model_name_or_path": "../private"}, "leads out of the folder: give its whole path"),
        ({"tune": "lora"}, {}, "names no base model, and neither does"),
    ],
)
def test_another_base_than_the_runs_is_refused(tmp_path, recipe, config, says):
    with pytest.raises(UserError, match=says):
        read_run(made(tmp_path / "run", recipe, config))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"base_model_name_or_path": 7}, "base_model_name_or_path is 7"),
        ({"base_model_name_or_path": "org/m", "auto_mapping": {"parent_library": "evil.code"}},
         "names the class of its base in 'evil.code': code that comes with a model is never run"),
        ({"trainable_token_indices": {"a": 5}}, "trainable_token_indices.*: input should be a valid"),
        ({"trainable_token_indices": [-1]}, "is -1: input should be greater than or equal to 0"),
        ({"trainable_token_indices": [True]}, "is True: input should be a valid integer"),
        ("{", "adapter_config.json cannot be used: it is not JSON"),
        ("[" * 100_000, "cannot be used: it is nested deeper than"),
        ("[1]", "cannot be used: it has no keys"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("has_base", [False, True])
def test_a_configuration_that_is_none_or_asks_for_code_is_one_sentence(tmp_path, config, says, has_base):
    run = made(tmp_path / "run", {"tune": "lora"}, config)
    if has_base:  # which was read without the configuration
        (run / "base_model").mkdir()
    with pytest.raises(UserError, match=says) as refused:
        read_run(run)
    assert "\n" not in str(refused.value)


def test_rows_that_neither_base_nor_tokenizer_has_are_not_made(tmp_path):
    tokenizer = builtin_tokenizer("builtin:opt-tiny")
    small_opt(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    rows = base.config.vocab_size
    tokenizer.add_tokens(["<one>", "<two>"])
    for last, fits in ((rows - 1, True), (rows + 1, True), (rows + 2, False), (1_000_000_000, False)):
        folder = made(tmp_path / str(last), {}, {"trainable_token_indices": {"embed_tokens": [last]}})
        tokenizer.save_pretrained(folder / "model")
        assert brought_rows(read_adapter_config(folder / "model")) == [last]
        run = FinishedRun(folder, {}, folder / "model", str(tmp_path / "base"), False)
        if fits:
            assert finished_run._grown(run, base).get_input_embeddings().weight.shape[0] == max(rows, last + 1)
        else:
            with pytest.raises(UserError, match=f"names the row {last:,}, and neither the base nor the tokenizer has"):
                finished_run._grown(run, base)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("max_seq_length", "12x", "max_seq_length is '12x': it takes a whole number of at least 3"),
        ("task_type", "foo", "task_type is 'foo': it takes"),
        ("overlong", "middle", "overlong is 'middle': it takes"),
        ("dataset_text_field", ["a"], "dataset_text_field is \\['a'\\]: it takes text"),
        ("bnb_4bit_quant_type", "int3", "bnb_4bit_quant_type is 'int3'"),
    ],
)
def test_a_value_that_no_recipe_has_is_named_when_a_run_is_used(tmp_path, key, value, says):
    recipe = {"task": "classification", "model_name_or_path": "org/model", "tune": "lora", "max_seq_length": 64}
    config = {"base_model_name_or_path": "org/model", "task_type": "SEQ_CLS"}
    with pytest.raises(UserError, match=says):
        read_run(made(tmp_path / "run", {**recipe, key: value}, config))
    with pytest.raises(UserError, match=r"adapter_model\.safetensors"):  # all else is as it should be
        read_run(made(tmp_path / "whole", recipe, config))
    assert is_classifier(FinishedRun(tmp_path, {}, tmp_path / "run" / "model", "org/model", False))
