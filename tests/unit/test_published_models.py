"""The shipped recipes of today's models against the geometry that their config.json publishes."""

import pytest
import torch
import yaml
from tests.launching import REPOSITORY
from tests.published import PUBLISHED
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from isotune.preflight.preflight_report import run_preflight
from isotune.preflight.request import read_preflight_request


def config_of(name: str):
    keys = dict(PUBLISHED[name][0])
    return AutoConfig.for_model(keys.pop("model_type"), **keys)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipes_model_has_the_parameters_of_its_published_geometry(name):
    recipe = yaml.safe_load((REPOSITORY / "train" / "configs" / f"{name}.yaml").read_text("utf-8"))
    config = config_of(name)
    if recipe["task"] == "classification":
        config.num_labels = recipe["num_labels"]
    kind = AutoModelForCausalLM if recipe["task"] == "sft" else AutoModelForSequenceClassification
    with torch.device("meta"):
        model = kind.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[name][1]
    # a document may be as long as the recipe says
    assert recipe["max_seq_length"] <= config.max_position_embeddings


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PUBLISHED if "deberta" not in name and "modernbert" not in name])
def test_a_recipe_fits_a_card_of_24_gib_by_plan(name, tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    config_of(name).save_pretrained(tmp_path)
    recipe = REPOSITORY / "train" / "configs" / f"{name}.yaml"
    asked = read_preflight_request(recipe, ["--model_name_or_path", str(tmp_path)], None, None)
    assert asked.problems == ()
    found = run_preflight(asked, limit=24 * 2**30, show_progress=False)
    assert found.fits
    weights = {"qlora": 0.53, "lora": 2, "full": 4}[asked.recipe.tune] * PUBLISHED[name][1]
    assert found.memory.weights >= weights
