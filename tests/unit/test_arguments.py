"""SFTConfig and TrainingArguments say the same of a recipe, though their defaults differ."""

from dataclasses import fields

import pytest
from accelerate.state import AcceleratorState, GradientState
from tests.launching import TINY
from transformers import TrainingArguments

from isotune.config import Recipe
from isotune.distributed.launch import start_process
from isotune.training.arguments import sft_arguments, training_arguments

# TRL reads the old name, and must not; the other two name a moment and an object
APART = {"gradient_checkpointing", "logging_dir", "run_name"}


@pytest.mark.parametrize(
    "values", [{}, {"bf16": True}, {"gradient_checkpointing": True, "learning_rate": 0.25}], ids=str
)
def test_both_libraries_arguments_agree_in_every_field_that_they_share(tmp_path, values) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    recipe = Recipe.from_values(**{**TINY, "output_dir": str(tmp_path / "run"), **values})
    process = start_process(recipe)
    stock, sft = training_arguments(recipe, process), sft_arguments(recipe, process)
    differing = {
        field.name: (getattr(stock, field.name), getattr(sft, field.name))
        for field in fields(TrainingArguments)
        if field.init and field.name not in APART and str(getattr(stock, field.name)) != str(getattr(sft, field.name))
    }
    assert differing == {}
    assert sft.activation_checkpointing is bool(values.get("gradient_checkpointing"))
    assert not sft.gradient_checkpointing and not sft.packing and sft.dataset_kwargs == {"skip_prepare_dataset": True}
