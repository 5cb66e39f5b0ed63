"""The recipe's table of the ecosystem's keys is held to the libraries that are installed.

`tests/fixtures/known_fields.json` lists the fields of the versions that were looked at. A later release that adds one
breaks nothing: its key is unknown to a recipe until somebody has looked at what it would do.
"""

import dataclasses
import enum
import inspect
import json
import typing
from pathlib import Path

import pytest

from isotune.config import Recipe
from isotune.config.engine_keys import ENGINE_KEYS, SCHEDULE_ARGUMENTS, Schedule, Tracker
from isotune.config.layers import ALIASES
from isotune.config.schema import parse
from isotune.config.unsupported_keys import UNSUPPORTED

KNOWN = json.loads(Path("tests/fixtures/known_fields.json").read_text())
REQUIRED = {"model_name_or_path": "a/model", "dataset_name": "a/dataset", "output_dir": "runs/x"}


@pytest.fixture(scope="module")
def engine_fields() -> dict[str, dataclasses.Field]:
    from transformers import TrainingArguments

    return {field.name: field for field in dataclasses.fields(TrainingArguments)}


def engine_is_known() -> bool:
    import transformers

    return transformers.__version__ == KNOWN["versions"]["transformers"]


def test_every_known_argument_of_the_engine_has_been_decided(engine_fields):
    decided = set(Recipe.keys()) | set(ALIASES) | set(UNSUPPORTED)
    assert set(KNOWN["TrainingArguments"]) - decided == set()
    assert set(KNOWN["TrainingArguments"]) == set(engine_fields) or not engine_is_known()


def test_every_known_argument_of_trls_sft_config_has_been_decided(engine_fields):
    import trl

    decided = set(Recipe.keys()) | set(ALIASES) | set(UNSUPPORTED)
    assert set(KNOWN["SFTConfig"]) - decided == set()
    own = {field.name for field in dataclasses.fields(trl.SFTConfig)} - set(engine_fields)
    assert set(KNOWN["SFTConfig"]) == own or trl.__version__ != KNOWN["versions"]["trl"]


def test_no_key_is_both_accepted_and_refused():
    assert not (set(Recipe.keys()) | set(ALIASES)) & set(UNSUPPORTED)


def test_every_tracker_of_the_engine_may_be_named_and_no_other():
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    accepted, offered = set(typing.get_args(Tracker)), {"none", "all", *INTEGRATION_TO_CALLBACK}
    assert accepted <= offered
    assert accepted == offered or not engine_is_known()


def test_the_arguments_of_every_schedule_are_those_of_the_engines_function():
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

    assert set(SCHEDULE_ARGUMENTS) == set(typing.get_args(Schedule))
    filled_in = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
    for name, (needed, optional) in SCHEDULE_ARGUMENTS.items():
        known = set(inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[name]).parameters) - filled_in
        assert {*needed, *optional} <= known, name
        assert known == {*needed, *optional} or not engine_is_known(), name


@pytest.mark.parametrize("schedule", sorted(SCHEDULE_ARGUMENTS))
def test_the_engine_makes_a_schedule_from_the_least_that_a_recipe_must_say(schedule):
    import torch
    from transformers import get_scheduler

    needed, _ = SCHEDULE_ARGUMENTS[schedule]
    least = {needed[0]: 1e-5 if needed[0] == "min_lr" else 2} if needed else None
    recipe = Recipe.from_values(**REQUIRED, lr_scheduler_type=schedule, lr_scheduler_kwargs=least)
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    chosen = recipe.training_arguments.get("lr_scheduler_kwargs")
    assert get_scheduler(schedule, optimiser, 2, 10, scheduler_specific_kwargs=chosen).get_last_lr()


def test_every_engine_key_is_an_argument_of_the_engine_and_its_choices_are_the_engines(engine_fields):
    assert set(ENGINE_KEYS) | set(ALIASES) - {"text_pair", "datasets"} <= set(engine_fields)
    for name, key in ENGINE_KEYS.items():
        members = typing.get_args(engine_fields[name].type) or (engine_fields[name].type,)
        known = {item.value for kind in members if isinstance(kind, enum.EnumMeta) for item in kind}
        if known:
            chosen = {word for part in (key.takes, *typing.get_args(key.takes)) for word in typing.get_args(part)}
            assert {word for word in chosen if isinstance(word, str)} <= known, name


def test_the_engine_takes_the_arguments_of_a_recipe_as_they_are(tmp_path):
    from transformers import TrainingArguments

    recipe = Recipe.from_values(
        **REQUIRED, eval_dataset_name="d", eval_steps=5, warmup_steps=0.1, report_to="tensorboard", log_level="error"
    )
    with pytest.warns(FutureWarning, match="gradient_checkpointing"):
        arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **recipe.training_arguments)
    for name, value in recipe.training_arguments.items():
        assert getattr(arguments, name) == value, name


def test_a_recipes_default_is_the_engines_own_unless_it_is_meant_to_differ(engine_fields):
    differing = {
        name
        for name, key in ENGINE_KEYS.items()
        if key.default is not None and key.default_from is None and key.default != engine_fields[name].default
    }
    assert differing == {"logging_steps", "report_to", "disable_tqdm", "gradient_checkpointing", "save_total_limit"}


def test_adapter_keys_are_spelled_as_in_peft_and_bitsandbytes():
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig

    names = {name for name, key in Recipe.keys().items() if key.group == "Adapter"}
    lora = {field.name for field in dataclasses.fields(LoraConfig)}
    quantisation = set(inspect.signature(BitsAndBytesConfig.__init__).parameters)
    assert {name for name in names if not name.startswith("bnb_")} <= lora
    assert {name for name in names if name.startswith("bnb_")} <= quantisation


def test_every_default_is_a_value_that_its_own_key_allows():
    for key in Recipe.keys().values():
        if not key.required and key.default is not None:
            parsed = parse(key, key.default)
            assert (parsed, type(parsed)) == (key.default, type(key.default)), key.name
