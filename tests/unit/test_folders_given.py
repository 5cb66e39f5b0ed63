"""Output of this program given where a model, a tokenizer, a run or a data set is expected is named as what it is."""

import json
import shutil

import pytest
from tests.building import small_opt

from isotune.commands.trained.evaluate import read_source
from isotune.config import Recipe
from isotune.data.sources.source import read_rows
from isotune.io.errors import UserError
from isotune.models.finished_run import read_run
from isotune.models.opening import load_config, load_tokenizer


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A run with a model, a checkpoint, an evaluation and an export, and a folder of data with a recipe beside them."""
    home = tmp_path_factory.mktemp("home")
    run = home / "run"
    small_opt(run / "model")
    (run / "recipe.yaml").write_text("tune: full\nmodel_name_or_path: base\n")
    (run / "status.json").write_text("{}")
    for folder in ("checkpoints/step-00000002", "eval/test", "export", "empty"):
        (run / folder).mkdir(parents=True)
    (run / "checkpoints" / "step-00000002" / "MANIFEST.json").write_text("{}")
    (run / "eval" / "test" / "metrics.json").write_text("{}")
    (run / "eval" / "test" / "predictions.jsonl").write_text('{"id": 1, "text": "a"}\n')
    shutil.copytree(run / "model", run / "export" / "merged-safetensors")
    data = home / "data"
    data.mkdir()
    (data / "train.jsonl").write_text(json.dumps({"text": "### Human: a ### Assistant: b"}) + "\n")
    (data / "recipe.yaml").write_text("max_steps: 1\n")
    return home


def recipe(**more):
    given = {"model_name_or_path": "builtin:opt-tiny", "dataset_name": "builtin:capitals", "output_dir": "run"}
    return Recipe.from_values(**{**given, "max_seq_length": 64, **more})


# the path below the run, and what a model, a tokenizer and a run are refused with; None where it is taken
OF_RUN = "of the run {run}, and no model: its model is {run}/model"
NO_RECIPE = "has no recipe.yaml, and is"
GIVEN = {
    "eval/test": (*(f"the result of an evaluation {OF_RUN}",) * 2, f"{NO_RECIPE} the result of an evaluation of"),
    "eval": (*(f"is a folder {OF_RUN}",) * 2, f"{NO_RECIPE} a folder of the run {{run}}"),
    "checkpoints/step-00000002": (*("is a checkpoint of a run: `isotune export",) * 2, f"{NO_RECIPE} a checkpoint of"),
    "export/merged-safetensors": (None, None, f"{NO_RECIPE} a model of the run {{run}}"),
    "model/model.safetensors": (*("is a file, and a model is a folder",) * 2, "is a file, and no run directory"),
    "../data": ("has no config.json, so it is no model", "has no tokenizer.json, so it is no tokenizer", None),
    "none": (*("folder '{path}' does not exist",) * 2, "there is no run directory {path}"),
}


@pytest.mark.parametrize("below", GIVEN)
def test_a_path_that_holds_something_else_is_named(home, below):
    run, path = home / "run", home / "run" / below
    uses = (
        lambda: load_config(recipe(model_name_or_path=str(path))),
        lambda: load_tokenizer(recipe(tokenizer_name_or_path=str(path))),
        lambda: read_run(path),
    )
    for use, says in zip(uses, GIVEN[below], strict=True):
        if says is None:
            if below != "../data":  # which has a recipe, and is refused later
                use()
            continue
        with pytest.raises(UserError) as refused:
            use()
        assert says.format(run=run, path=path) in str(refused.value)


@pytest.mark.parametrize(
    ("below", "what"),
    [
        (".", "is a run"),
        ("model", "is a model of the run"),
        ("eval/test", "is the result of an evaluation of the run"),
        ("checkpoints/step-00000002", "is a checkpoint of the run"),
    ],
)
def test_what_is_no_data_set_is_named(home, below, what):
    with pytest.raises(UserError, match=f"eval_dataset_name: .* {what}.*, and no data set"):
        read_rows(str(home / "run" / below), "train", name="eval_dataset_name")


def test_a_recipe_beside_data_makes_no_run_of_it_and_files_of_a_run_are_data_where_they_are_named(home):
    assert next(iter(read_rows(str(home / "data"), "train").rows()))["text"].startswith("### Human")
    lines = read_rows(str(home / "run" / "eval" / "test" / "predictions.jsonl"), "train")
    assert [row["text"] for row in lines.rows()] == ["a"]


def test_data_beside_a_file_that_this_program_writes_too_are_data(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    for name in ("MANIFEST.json", "recipe.yaml", "status.json"):
        (tmp_path / name).write_text("{}")
    assert [row["text"] for row in read_rows(str(tmp_path), "train").read()] == ["a"]


def test_the_model_folder_of_a_run_is_evaluated_as_the_run(home):
    assert read_source("eval", [str(home / "run" / "model"), "--limit", "3"], "")[0] == ["--run_dir", str(home / "run")]
    export = str(home / "run" / "export" / "merged-safetensors")
    assert read_source("eval", [export], "")[0] == ["--model", export]
