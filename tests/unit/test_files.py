"""A file is replaced as a whole or not at all."""

import pytest

from isotune.checkpoint.final_model import replace_folder, staging_for
from isotune.io.files import replace_file, replacing, set_aside


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path):
    replace_file(tmp_path / "a.json", "old")
    replace_file(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_an_error_while_writing_leaves_the_old_file_alone(tmp_path):
    replace_file(tmp_path / "a.json", "old")
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "a.json") as staging:
        staging.write_text("half")
        assert (tmp_path / "a.json").read_text() == "old"
        raise KeyboardInterrupt
    assert (tmp_path / "a.json").read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_new_content_may_be_staged_in_another_folder(tmp_path):
    (tmp_path / "staging").mkdir()
    replace_file(tmp_path / "a.json", "new", tmp_path / "staging" / "a.json")
    assert (tmp_path / "a.json").read_text() == "new"
    assert list((tmp_path / "staging").iterdir()) == []


@pytest.mark.parametrize("is_named", [False, True], ids=["its own place", "a place that is given"])
@pytest.mark.parametrize("leads_somewhere", [True, False])
def test_a_link_at_the_temporary_name_of_a_file_is_replaced_and_its_target_left_alone(
    tmp_path, is_named, leads_somewhere
):
    other, run = tmp_path / "other.txt", tmp_path / "run"
    run.mkdir()
    if leads_somewhere:
        other.write_text("mine")
    staging = run / (".given" if is_named else ".a.json.tmp")
    staging.symlink_to(other)
    replace_file(run / "a.json", "new", staging if is_named else None)
    assert (run / "a.json").read_text() == "new" and not (run / "a.json").is_symlink()
    assert [entry.name for entry in run.iterdir()] == ["a.json"]
    assert (other.read_text() == "mine") if leads_somewhere else not other.exists()


def test_a_folder_at_the_temporary_name_of_a_file_is_an_error_that_names_the_file(tmp_path):
    (tmp_path / ".a.json.tmp").mkdir()
    with pytest.raises(OSError) as refused:
        replace_file(tmp_path / "a.json", "new")
    assert refused.value.filename == str(tmp_path / "a.json")


@pytest.mark.parametrize("name", ["model.unverified", "model.before", "model"])
def test_a_link_among_the_names_of_a_folder_is_replaced_and_its_target_left_alone(tmp_path, name):
    other, run = tmp_path / "other", tmp_path / "run"
    for folder in (other, run):
        folder.mkdir()
    (other / "config.json").write_text("mine")
    (run / name).symlink_to(other)
    for text in ("first", "second"):  # the second finds what the first has left
        with staging_for(run / "model") as staging:
            staging.mkdir()
            (staging / "config.json").write_text(text)
        replace_folder(staging, run / "model")
        assert (run / "model" / "config.json").read_text() == text and not (run / "model").is_symlink()
    assert (other / "config.json").read_text() == "mine"
    set_aside(run / "model")
    assert not (run / "model").exists() and (other / "config.json").read_text() == "mine"
