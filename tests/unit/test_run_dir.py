"""A run's folder belongs to one recipe: what is there already is looked at before anything is touched."""

import errno
import json
import os
import tempfile

import pytest
import torch
import yaml
from tests.launching import TINY

from isotune.config import Recipe
from isotune.distributed.launch import Process
from isotune.distributed.ranks import call_on_main
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


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="a second file system is needed")
def test_checkpoints_on_another_file_system_are_refused_before_the_first_step(tmp_path):
    """They are renamed out of the attempt's folder in RUN."""
    run = RunDir(recipe(tmp_path / "run"))
    run.begin({})
    (tmp_path / "scratch").mkdir()
    (run.path / "checkpoints").symlink_to(tmp_path / "scratch")
    run.check()  # the same file system
    with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:
        if os.stat(elsewhere).st_dev == os.stat(tmp_path).st_dev:
            pytest.skip("it is the same file system")
        (run.path / "checkpoints").unlink()
        (run.path / "checkpoints").symlink_to(elsewhere)
        with pytest.raises(UserError, match=r"run/checkpoints is on another file system .*: put output_dir itself"):
            RunDir(run.recipe).check()


def test_a_life_that_goes_on_begins_with_the_metrics_of_its_checkpoint(tmp_path):
    run = RunDir(recipe(tmp_path / "run"))
    run.begin({})
    (run.path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    run.begin({}, metrics='{"step": 1}\n')
    assert (run.path / "metrics.jsonl").read_text() == '{"step": 1}\n'


@pytest.mark.parametrize("made", [os.symlink, lambda _, file: os.mkfifo(file)])
def test_metrics_that_are_no_file_of_this_run_are_refused_and_not_copied(tmp_path, made):
    """A run of somebody else's may have a link to a file of the user's, which the next attempt would copy."""
    run = RunDir(recipe(tmp_path / "run"))
    run.begin({})
    (tmp_path / "private.txt").write_text("a secret\n")
    made(tmp_path / "private.txt", run.path / "metrics.jsonl")
    before = sorted(path.name for path in run.path.iterdir())
    for refused in (RunDir(run.recipe).check, lambda: RunDir(run.recipe).acquire_lease(1)):
        with pytest.raises(
            UserError, match=r"run/metrics.jsonl is a (link that leads out|pipe).*: put the file itself"
        ):
            refused()
    assert (tmp_path / "private.txt").read_text() == "a secret\n"
    assert sorted(path.name for path in run.path.iterdir() if path.name != ".lives") == before


def test_metrics_that_a_link_within_the_run_leads_to_become_a_file(tmp_path):
    run = RunDir(recipe(tmp_path / "run"))
    run.begin({})
    (run.path / "earlier.jsonl").write_text('{"step": 1}\n')
    (run.path / "metrics.jsonl").symlink_to("earlier.jsonl")
    run.check()
    run.acquire_lease(1)
    run.lease.release()
    assert not (run.path / "metrics.jsonl").is_symlink()
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
    finished(run)
    with pytest.raises(AlreadyDone, match=r"holds the finished run.*--resume never"):
        run.check()
    RunDir(recipe(tmp_path / "run", resume="never")).check()


def finished(run: RunDir, **made: int) -> None:
    (run.path / "status.json").write_text(json.dumps({"status": "finished", "made": made}))


def test_a_run_is_finished_where_it_says_so_and_all_that_it_made_is_there(tmp_path):
    run = RunDir(recipe(tmp_path / "run"))
    run.begin({})
    run.model.mkdir()
    run.check()
    assert run.is_trained, "nobody says that the steps after training are done"
    card, weights = run.model / "README.md", run.model / "model.safetensors"
    card.write_text("edited since")
    weights.write_bytes(b"1234")
    made = {"model/README.md": 3, "model/model.safetensors": 4}
    finished(run, **made)
    with pytest.raises(AlreadyDone):
        run.check()
    weights.write_bytes(b"123")
    run.check()
    weights.write_bytes(b"1234")
    card.unlink()
    run.check()


def test_room_for_the_last_words_is_taken_with_the_lease_also_where_training_is_over(tmp_path):
    run = RunDir(recipe(tmp_path / "run"))
    folder = run.acquire_lease(1)
    assert (folder / "reserve").stat().st_size > 10_000
    assert run.lease.free_reserve()
    run.lease.release()


def test_a_lease_that_cannot_be_used_is_given_back(tmp_path, monkeypatch):
    run = RunDir(recipe(tmp_path / "run"))
    run.begin({}, metrics='{"step": 1}\n')

    def full(path, text):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(run.lease, "write_file", full)
    with pytest.raises(UserError, match=r"metrics.jsonl' cannot be written or opened: there is no room"):
        call_on_main(Process(0, 1, torch.device("cpu")), lambda: run.acquire_lease(1))
    assert run.lease.folder is None and not run.lease.active()


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
