"""A log of a rank is the run's own file."""

import pytest

from isotune.distributed.rank_log import rank_log


def log_of(folder, name: str = "rank-0.log"):
    return folder / "run" / "logs" / name


def test_each_of_several_ranks_has_a_log_that_says_where_it_was_and_how_it_ended(tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(KeyError), rank_log(log_of(tmp_path), 0, 2):
        raise KeyError("a bug")
    said = log_of(tmp_path).read_text()
    assert " rank 0 of 2 on " in said.splitlines()[0] and said.endswith("KeyError: 'a bug'\n")
    with rank_log(log_of(tmp_path, "rank-1.log"), 1, 1):
        pass
    assert not log_of(tmp_path, "rank-1.log").exists()


@pytest.mark.parametrize("linked", ["logs", "logs/rank-0.log"])
def test_a_log_that_is_a_link_out_of_its_folder_is_left_alone(tmp_path, linked):
    """A run of somebody else's may have a link to a file of the user's."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "rank-0.log").write_text("mine\n")
    place = tmp_path / "run" / linked
    place.parent.mkdir(parents=True)
    place.symlink_to(tmp_path / "mine" if linked == "logs" else tmp_path / "mine" / "rank-0.log")
    with rank_log(log_of(tmp_path), 0, 2):
        pass
    assert (tmp_path / "mine" / "rank-0.log").read_text() == "mine\n"
