"""Exit statuses are a contract: 0 done, 2 the user's input, 1 a run that cannot go on; one line each."""

import errno
import os

import pytest

from isotune.io.errors import RunFault, UserError, as_user_error, run_script
from isotune.io.variables import check_numbers


def leave(main) -> int:
    with pytest.raises(SystemExit) as leaving:
        run_script(main)
    return leaving.value.code


@pytest.mark.parametrize(("error", "status"), [(UserError("row 3 is empty"), 2), (RunFault("it leaks"), 1)])
def test_a_known_error_is_one_line_and_its_status(capsys, error, status):
    def main() -> None:
        raise error

    assert leave(main) == status
    said = capsys.readouterr()
    assert said.err == f"error: {error}\n" and said.out == ""


def test_only_the_first_process_of_a_machine_prints_it(capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")

    def main() -> None:
        raise UserError("no")

    assert leave(main) == 2
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("rank", ["-1", "x", "", " "])
def test_a_local_rank_that_is_none_hides_no_error(capsys, monkeypatch, rank):
    monkeypatch.setenv("LOCAL_RANK", rank)

    def main() -> None:
        raise UserError("no")

    assert leave(main) == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize(("returned", "status"), [(None, 0), (0, 0), (75, 75)])
def test_what_main_returns_is_the_status(returned, status):
    assert leave(lambda: returned) == status


def test_a_fault_in_the_program_keeps_its_traceback():
    def main() -> None:
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        run_script(main)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.EACCES, errno.ENOSPC, errno.EROFS])
def test_a_disk_that_takes_no_file_is_the_users_to_mend(number):
    said = as_user_error(OSError(number, os.strerror(number), "RUN/model/README.md"))
    assert said is not None and str(said).startswith("'RUN/model/README.md' cannot be written or opened: ")


@pytest.mark.parametrize(("number", "is_a_disks"), [(errno.EIO, True), (errno.ENOTCONN, False), (errno.EACCES, False)])
def test_an_error_that_connections_have_too_is_a_disks_where_it_comes_with_a_file(number, is_a_disks):
    assert (as_user_error(OSError(number, os.strerror(number))) is not None) == is_a_disks


@pytest.mark.parametrize(
    ("name", "value", "takes"),
    [
        ("MEETING_SECONDS", "x", "a number of seconds above 0"),
        ("MEETING_SECONDS", "0", "a number of seconds above 0"),
        ("MEETING_SECONDS", "nan", "a number of seconds above 0"),
        ("MASTER_PORT", "70000", "a whole number from 0 to 65,535"),
        ("RANK", "-1", "a whole number from 0 on"),
    ],
)
def test_a_variable_that_is_no_number_in_its_range_is_named(name, value, takes):
    with pytest.raises(UserError, match=f"variable {name} is {value!r}: it takes {takes}"):
        check_numbers({name: value})
    check_numbers({"MEETING_SECONDS": "0.3", "MASTER_PORT": "29500", "RANK": " ", "WORLD_SIZE": "2"})
