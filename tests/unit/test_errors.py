"""Exit statuses are a contract: 0 done, 2 the user's input, 1 a run that cannot go on; one line each."""

import pytest

from isotune.io.errors import RunFault, UserError, run_script


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
