"""A file is replaced as a whole or not at all."""

import pytest

from isotune.io.files import replace_file, replacing


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
