"""A plan finds every mistake at once, in recipe, accelerate file and DeepSpeed file, and none in what is shipped."""

from pathlib import Path

import pytest
import yaml
from benchmarks.mistakes.cases import CASES, RECIPE, write_case
from tests.launching import REPOSITORY
from tests.published import PUBLISHED
from transformers import AutoConfig

from isotune.io.errors import UserError
from isotune.preflight.preflight_report import run_preflight
from isotune.preflight.render import render_report
from isotune.preflight.request import read_preflight_request

BASELINES = REPOSITORY / "train" / "configs" / "arena_baselines.yaml"
RECIPES = sorted(set((REPOSITORY / "train" / "configs").glob("*.yaml")) - {BASELINES})
LAUNCHES = sorted((REPOSITORY / "accelerate_configs").glob("*.yaml"))


def flags(**values) -> list[str]:
    return [word for key, value in values.items() for word in (f"--{key}", str(value))]


def test_the_corpus_is_large_enough():
    assert len(CASES) >= 40
    assert {case.kind for case in CASES} == {"misspelt", "ineffective", "contradicting", "impossible"}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kind}-{case.expects}")
def test_a_mistake_is_found_and_its_key_named(case, tmp_path):
    recipe, accelerate = write_case(case, tmp_path)
    try:
        problems = read_preflight_request(recipe, [], str(accelerate), None).problems
    except UserError as refused:
        problems = (str(refused),)
    assert any(case.expects in problem for problem in problems), problems


def test_a_right_recipe_under_a_right_launch_has_no_problem(tmp_path):
    assert (
        read_preflight_request(None, flags(**RECIPE), str(REPOSITORY / "accelerate_configs" / "zero2.yaml"), 3).problems
        == ()
    )


def small_config(recipe: Path, folder: Path) -> list[str]:
    """Flags that give a recipe a configuration of its own model's kind, where it names one of the Hub."""
    name = yaml.safe_load(recipe.read_text("utf-8"))["model_name_or_path"]
    if name.startswith("builtin:"):
        return []
    if recipe.stem in PUBLISHED:
        published = dict(PUBLISHED[recipe.stem][0])
        kind, small = published.pop("model_type"), {"num_hidden_layers": 2, "vocab_size": 500}
        small |= dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"))
        AutoConfig.for_model(kind, **{**published, **small, "pad_token_id": 0}).save_pretrained(folder)
        return ["--model_name_or_path", str(folder)]
    kinds = (kind for kind in ("distilbert", "roberta", "albert", "bert", "opt") if kind in name.lower())
    kind = next(kinds, "opt")  # the demo continues from a run
    small = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 500}
    AutoConfig.for_model(kind, **small, max_position_embeddings=1100).save_pretrained(folder)
    return ["--model_name_or_path", str(folder)]


@pytest.mark.parametrize("launch", LAUNCHES, ids=lambda file: file.stem)
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda file: file.stem)
def test_every_shipped_recipe_suits_every_shipped_launch(recipe, launch, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    asked = read_preflight_request(recipe, [], str(launch), None)
    assert asked.problems == ()
    assert asked.launch.world_size == (1 if launch.stem == "single" else 2)


@pytest.mark.slow
@pytest.mark.parametrize("launch", LAUNCHES, ids=lambda file: file.stem)
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda file: file.stem)
def test_every_shipped_recipe_is_planned_under_every_shipped_launch(recipe, launch, monkeypatch, tmp_path):
    monkeypatch.chdir(REPOSITORY)
    asked = read_preflight_request(recipe, small_config(recipe, tmp_path), str(launch), None)
    found = run_preflight(asked, limit=24 * 2**30, show_progress=False)
    assert found.fits
    assert found.memory.activations > 0
    assert found.memory.weights > 0 or launch.stem == "zero3_offload"
    assert (found.memory.in_host_memory > 0) == (launch.stem == "zero3_offload")
    assert f"launch      {asked.launch.in_words} " in render_report(found, None)


def test_all_mistakes_are_said_at_once(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model_name_or_path: builtin:opt-tiny\nlearning_rat: 1\ntune: full\nr: 8\nbf16: true\nfp16: true\n"
    )
    found = read_preflight_request(recipe, ["--optim", "adamv"], None, None).problems
    assert len(found) == 5
    for key in ("learning_rate", "dataset_name", "r has no effect", "bf16", "--optim"):
        assert any(key in sentence for sentence in found), (key, found)


def test_a_recipe_is_known_by_its_keys_and_else_by_its_model():
    own = {"output_dir": "runs/x", "model_name_or_path": "builtin:opt-tiny", "dataset_name": "builtin:greetings"}
    assert type(read_preflight_request(None, flags(**own), None, None).recipe).__name__ == "Recipe"
    bert = own | {"model_name_or_path": "builtin:bert-tiny"}
    assert type(read_preflight_request(None, flags(**bert), None, None).recipe).__name__ == "ClassificationRecipe"
    labels = own | {"num_labels": 3}
    assert type(read_preflight_request(None, flags(**labels), None, None).recipe).__name__ == "ClassificationRecipe"


def test_a_task_that_only_the_model_suggests_is_said_to_be_a_guess():
    own = {"output_dir": "runs/x", "model_name_or_path": "builtin:bert-tiny", "dataset_name": "builtin:opinions"}
    guessed = read_preflight_request(None, flags(**own), None, None)
    assert guessed.guess == "task is guessed to be classification from the model's type, bert: say task: classification"
    for more in ({"task": "classification"}, {"num_labels": 3}):
        said = read_preflight_request(None, flags(**own, **more), None, None)
        assert type(said.recipe) is type(guessed.recipe) and said.guess is None


def test_a_task_that_neither_a_key_nor_a_model_says_is_asked_for(tmp_path):
    own = {"output_dir": "runs/x", "model_name_or_path": str(tmp_path / "none"), "dataset_name": "builtin:opinions"}
    assert read_preflight_request(None, flags(**own), None, None).problems == (
        "task is missing: add task: sft or task: classification to the recipe",
    )
    with pytest.raises(UserError, match="task is 'sftt': did you mean 'sft'"):
        read_preflight_request(None, flags(**own, task="sftt"), None, None)


@pytest.mark.parametrize("file", ["missing.yaml", "list.yaml", "broken.yaml"])
def test_a_launch_file_that_is_none_is_one_of_the_problems(file, tmp_path: Path):
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    asked = read_preflight_request(None, flags(**RECIPE), str(tmp_path / file), None)
    assert len(asked.problems) == 1 and file in asked.problems[0]


def test_no_process_is_refused():
    with pytest.raises(UserError, match="--world_size is 0"):
        read_preflight_request(None, flags(**RECIPE), None, 0)


def test_baselines_have_nothing_to_plan():
    with pytest.raises(UserError, match="method: baselines trains no network"):
        read_preflight_request(BASELINES, [], None, None)
