"""A run's folder belongs to one recipe: what is there already is looked at before anything is touched."""

import json
import os

import pytest
import yaml
from tests.launching import TINY

from isotune.config import Recipe
from isotune.io.errors import AlreadyDone, UserError
from isotune.run.run_dir import RunDir


def recipe(folder, **values) -> Recipe:
    return Recipe.from_values(**{**TINY, "output_dir": str(folder), **values})


def test_a_new_folder_holds_the_recipe_and_the_environment_and_only_after_begin(tmp_path):
    one = recipe(tmp_path / "a" / "run")
    run = RunDir(one)
    run.check()
    assert not run.path.exists()
    run.begin({"world_size": 1})
    assert sorted(p.name for p in run.path.iterdir()) == ["environment.json", "recipe.yaml"]
    assert Recipe.from_values(**yaml.safe_load((run.path / "recipe.yaml").read_text())) == one
    assert json.loads((run.path / "environment.json").read_text())["world_size"] == 1


def test_an_unfinished_try_of_the_same_recipe_begins_anew(tmp_path):
    run = RunDir(recipe(tmp_path / "run"))
    run.begin({})
    (run.path / "metrics.jsonl").write_text("{}\n")
    RunDir(recipe(tmp_path / "run")).check()
    run.begin({})
    assert not (run.path / "metrics.jsonl").exists()


def test_a_life_that_goes_on_begins_with_the_metrics_of_its_checkpoint(tmp_path):
    run = RunDir(recipe(tmp_path / "run"))
    run.begin({})
    (run.path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    run.begin({}, metrics='{"step": 1}\n')
    assert (run.path / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_a_life_that_was_killed_before_its_first_file_was_whole_leaves_a_folder_to_begin_in(tmp_path):
    run = RunDir(recipe(tmp_path / "run"))
    run.path.mkdir()
    (run.path / ".environment.json.tmp").write_text("{")
    run.check()


def test_keys_that_change_no_result_may_differ_and_others_are_named(tmp_path):
    RunDir(recipe(tmp_path / "run")).begin({})
    RunDir(recipe(tmp_path / "run", microbatch_tokens=512, run_name="other")).check()
    with pytest.raises(UserError, match=r"another recipe \(seed: 42 there, 43 here\)"):
        RunDir(recipe(tmp_path / "run", seed=43)).check()


def test_a_finished_run_has_nothing_left_to_do_unless_it_shall_never_resume(tmp_path):
    run = RunDir(recipe(tmp_path / "run"))
    run.begin({})
    run.model.mkdir()
    with pytest.raises(AlreadyDone, match=r"holds the finished run.*--resume never"):
        run.check()
    RunDir(recipe(tmp_path / "run", resume="never")).check()


@pytest.mark.parametrize("content", ["{broken", "[]", ""])
def test_an_environment_that_cannot_be_read_is_refused_by_its_name(tmp_path, content):
    run = RunDir(recipe(tmp_path / "run"))
    run.begin({})
    (run.path / "environment.json").write_text(content)
    with pytest.raises(UserError, match=r"environment\.json cannot be read"):
        run.check()


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match=r"'.*run' is a file"):
        RunDir(recipe(tmp_path / "run")).check()


def test_a_file_among_the_parents_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        RunDir(recipe(tmp_path / "file" / "run")).check()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="no permission"):
        RunDir(recipe(tmp_path / "run")).check()


def test_room_is_compared_in_megabytes(tmp_path):
    run = RunDir(recipe(tmp_path / "a" / "run"))
    run.check_room(1)
    with pytest.raises(UserError, match=r"MB free, and the model to be saved there needs 1000000000000 MB"):
        run.check_room(10**18)
