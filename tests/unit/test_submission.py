"""A submission that is right passes, and each kind of fault is named by a sentence of its own and by no other."""

import csv
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.test_cli import run

from isotune.io.errors import UserError
from isotune.projects.arena.submission import check_submission, write_submission

HEADER = ["id", "winner_model_a", "winner_model_b", "winner_tie"]
CLASSES = HEADER[1:]
IDS = st.lists(st.text("0123456789abcé,\"'", min_size=1, max_size=6), min_size=2, max_size=12, unique=True)


def write(file, rows, header=HEADER):
    with file.open("w", encoding="utf-8", newline="") as lines:
        csv.writer(lines).writerows([header, *rows])
    return file


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("submissions")


@st.composite
def submissions(draw):
    """Ids and a submission's rows for them, all right, each a list of cells."""
    ids = draw(IDS)
    weights = np.array(draw(st.lists(st.tuples(*[st.floats(0.01, 1)] * 3), min_size=len(ids), max_size=len(ids))))
    shares = weights / weights.sum(axis=1, keepdims=True)
    return ids, [[each, *map(repr, row)] for each, row in zip(ids, shares.tolist(), strict=True)]


def problems(folder, ids, rows, header=HEADER):
    sample = write(folder / "sample.csv", [[each, *["0.333333333333333"] * 3] for each in ids])
    found, count = check_submission(write(folder / "submission.csv", rows, header), sample)
    assert count == sum(len(row) == len(header) for row in rows)
    return [problem.removeprefix(f"{folder / 'submission.csv'}: ") for problem in found]


@settings(max_examples=60, deadline=None)
@given(submission=submissions(), data=st.data())
def test_what_is_written_is_what_the_sample_asks_for_to_the_bit_and_right(folder, submission, data):
    ids, rows = submission
    numbers = np.array([[float(cell) for cell in row[1:]] for row in rows])
    asked = data.draw(st.permutations(ids))
    sample = write(folder / "sample.csv", [[each, 0.5, 0.5, 0] for each in asked])
    write_submission(folder / "submission.csv", ids, numbers, sample)
    assert check_submission(folder / "submission.csv", sample) == ([], len(ids))
    with (folder / "submission.csv").open(encoding="utf-8", newline="") as lines:
        header, *written = csv.reader(lines)
    assert header == HEADER and [row[0] for row in written] == asked
    assert {row[0]: [float(cell) for cell in row[1:]] for row in written} == dict(
        zip(ids, numbers.tolist(), strict=True)
    )


def of_ids(kind):
    """A fault of the ids, done to rows; returns the id that must be named."""

    def fault(rows, ids, row, data):
        if kind == "missing":
            return rows.pop(row)[0]
        if kind == "given more than once":
            rows.append(list(rows[row]))
        elif kind == "not in the sample":
            rows.append(["zz", *rows[row][1:]])
            return "zz"
        else:
            other = data.draw(st.integers(0, len(rows) - 1).filter(lambda number: number != row))
            rows[row], rows[other] = rows[other], rows[row]
            return rows[min(row, other)][0]
        return rows[row][0]

    return fault


def of_a_cell(*values):
    """One cell is another one; returns the row that must be named."""

    def fault(rows, ids, row, data):
        rows[row][data.draw(st.integers(1, 3))] = data.draw(st.sampled_from(values))
        return f"row {row + 1} (id {ids[row]})"

    return fault


def of_a_sum(rows, ids, row, data):
    off = data.draw(st.floats(2e-5, 0.5))
    rows[row][1:] = [repr(0.5), repr(0.5 - off), "0"]
    return f"row {row + 1} (id {ids[row]})"


def of_a_width(rows, ids, row, data):
    rows[row] = rows[row][:2] if data.draw(st.booleans()) else [*rows[row], "1"]
    return f"row {row + 1} has {len(rows[row])}"


FAULTS = {
    "of the sample missing": of_ids("missing"),
    "not in the sample": of_ids("not in the sample"),
    "given more than once": of_ids("given more than once"),
    "are in another order": of_ids("another order"),
    "no finite number": of_a_cell("nan", "NaN", "", "inf", "-inf", "a half", "1_0", "0,5"),
    "no number from 0 to 1": of_a_cell("-0.1", "1.01", "1e9"),
    "do not sum to 1": of_a_sum,
    "not 4 cells": of_a_width,
}
BRINGS_ANOTHER = {"no number from 0 to 1": "do not sum to 1", "not 4 cells": "of the sample missing"}


@pytest.mark.parametrize("sentence", FAULTS)
@settings(max_examples=25, deadline=None)
@given(submission=submissions(), data=st.data())
def test_one_fault_is_one_sentence_that_names_where_it_is(folder, sentence, submission, data):
    ids, rows = submission
    row = data.draw(st.integers(0, len(ids) - 1))
    named = FAULTS[sentence](rows, ids, row, data)
    found = [problem for problem in problems(folder, ids, rows) if sentence in problem]
    others = [problem for problem in problems(folder, ids, rows) if sentence not in problem]
    assert len(found) == 1 and named in found[0]
    assert all(BRINGS_ANOTHER.get(sentence, "nothing else") in problem for problem in others)


@pytest.mark.parametrize(
    ("header", "says"),
    [
        (["id", "winner_model_b", "winner_model_a", "winner_tie"], "another order, id, winner_model_b, winner_model_a"),
        (["id", "winner_model_a", "winner_model_b", "tie"], "missing 'winner_tie'; unknown 'tie'"),
        (["Id", *CLASSES], "missing 'id'; unknown 'Id'"),
        (["id", "winner_model_a", "winner_model_a", "winner_tie"], "missing 'winner_model_b'; twice 'winner_model_a'"),
    ],
)
def test_columns_are_named_that_are_missing_unknown_twice_or_out_of_order(folder, header, says):
    found = problems(folder, ["1", "2"], [["1", "0.5", "0.25", "0.25"], ["2", "1", "0", "0"]], header)
    assert len(found) == 1 and says in found[0]


def test_every_fault_of_a_file_is_said_and_only_three_examples_of_each(folder):
    ids = [str(number) for number in range(10)]
    rows = [[each, "0.9", "0.9", "nan"] for each in ids[:-1]] + [["0", "2", "0", "0"]]
    found = problems(folder, ids, rows)
    assert len(found) == 5
    (numbers,) = [problem for problem in found if "finite" in problem]
    assert "row 3 (id 2) has nan as winner_tie and 6 more" in numbers and "row 4" not in numbers


def test_ids_are_texts_and_not_numbers(folder):
    found = problems(folder, ["007", "1"], [["7", "1", "0", "0"], ["1", "1", "0", "0"]])
    assert ["missing: 007" in found[0], "not in the sample: 7" in found[1]] == [True, True]


def test_probabilities_for_other_rows_than_the_samples_are_not_written(folder):
    sample = write(folder / "sample.csv", [["1", 1, 0, 0], ["2", 1, 0, 0]])
    with pytest.raises(UserError, match="asks for 2 ids, and they are not the 2 of the test rows"):
        write_submission(folder / "never.csv", ["1", "3"], np.full((2, 3), 1 / 3), sample)
    assert not (folder / "never.csv").exists()


def test_the_command_ends_with_2_and_a_line_a_fault_or_says_that_nothing_is_wrong(capsys, shared_data, tmp_path):
    sample = shared_data / "arena" / "sample_submission.csv"
    status, said, _ = run(capsys, "validate-submission", str(sample), "--sample", str(sample))
    assert (status, said) == (0, f"{sample}: 674 rows, nothing is wrong\n")
    broken = tmp_path / "broken.csv"
    broken.write_text(sample.read_text().replace("0.333333333333333", "0.5", 4).replace("\n30216,", "\n302160,"))
    status, said, wrong = run(capsys, "validate-submission", str(broken), "--sample", str(sample))
    assert (status, said, len(wrong.splitlines())) == (2, "", 3)
    assert all(line.startswith(f"error: {broken}: ") for line in wrong.splitlines())


@pytest.mark.parametrize(("content", "says"), [(b"", "is empty"), (b"id,a\n\xff,1\n", "UTF-8"), (None, "No such file")])
def test_a_file_that_is_no_table_is_one_sentence(capsys, tmp_path, content, says):
    sample = write(tmp_path / "sample.csv", [["1", 1, 0, 0]])
    if content is not None:
        (tmp_path / "file.csv").write_bytes(content)
    status, _, wrong = run(capsys, "validate-submission", str(tmp_path / "file.csv"), "--sample", str(sample))
    assert status == 2 and len(wrong.splitlines()) == 1 and says in wrong


def test_a_pipe_is_refused_and_not_waited_for(capsys, tmp_path):
    os.mkfifo(tmp_path / "pipe.csv")
    status, _, complaint = run(
        capsys, "validate-submission", str(tmp_path / "pipe.csv"), "--sample", str(tmp_path / "pipe.csv")
    )
    assert status == 2 and "pipe.csv is a pipe, not a file" in complaint


def test_an_id_that_a_spreadsheet_would_compute_is_not_written(folder):
    with pytest.raises(UserError, match="the id '=1\\+1' begins a formula"):
        write_submission(folder / "s.csv", ["-5", "=1+1"], np.full((2, 3), 1 / 3), None)
    assert not (folder / "s.csv").exists()
