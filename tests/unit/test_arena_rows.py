"""The Arena's files are read as Kaggle writes them, and the row is named where one is broken."""

import csv
import json

import pytest
from tests.battles import swapped

from isotune.io.errors import UserError
from isotune.projects.arena.battles import TIE, WINS_A, WINS_B, Battle, read_battles, read_competition

HEADER = ["id", "model_a", "model_b", "prompt", "response_a", "response_b"]
FLAGS = ["winner_model_a", "winner_model_b", "winner_tie"]
GOOD = ["30192", "x", "y", '["Hi"]', '["Hello"]', '["Hey", null]', "0", "1", "0"]
GOOD[3] = '["Hi", "Again"]'
GOOD[4] = '["Hello", "Yes?"]'


def write(file, *rows, header=(*HEADER, *FLAGS)):
    with file.open("w", encoding="utf-8", newline="") as lines:
        csv.writer(lines).writerows([header, *rows])
    return file


def changed(**cells):
    columns = [*HEADER, *FLAGS]
    return [cells.get(column, cell) for column, cell in zip(columns, GOOD, strict=True)]


def test_lists_nulls_lone_surrogates_and_ids_with_zeros_are_read_as_what_they_are(tmp_path):
    row = changed(id="007", prompt=json.dumps(["a \ud83d b", '🙂\n"quoted"']), winner_model_b="0", winner_tie="1")
    found = read_battles(write(tmp_path / "train.csv", GOOD, row), labelled=True)
    first, second = found.battles
    assert (first.prompt, first.answer_b, first.label) == (("Hi", "Again"), ("Hey", ""), WINS_B)
    assert (second.id, second.prompt, second.label) == ("007", ("a \ufffd b", '🙂\n"quoted"'), TIE)
    assert (found.null_turns, found.lone_surrogates) == (2, 1)
    "".join(second.prompt).encode()


@pytest.mark.parametrize(
    ("cells", "says"),
    [
        ({"prompt": "Hi"}, r"row 2 \(id 2\), column prompt: no JSON list of texts: 'Hi'"),
        ({"response_a": '["cut'}, r"row 2 \(id 2\), column response_a: no JSON list"),
        ({"response_b": "[1, 2]"}, "column response_b: no JSON list"),
        ({"response_b": "[]"}, "column response_b: no JSON list"),
        ({"response_a": '["one"]'}, "row 2 .*: 2 turns of prompt, 1 of response_a, 2 of response_b"),
        ({"winner_tie": "1"}, "row 2 .*one winner is 1.*winner_model_b '1', winner_tie '1'"),
        ({"winner_model_b": "0"}, "one winner is 1"),
        ({"id": "30192"}, r"row 2 \(id 30192\): the id stands in row 1 too"),
        ({"id": ""}, "row 2: the id is empty"),
    ],
)
def test_a_broken_row_is_named(tmp_path, cells, says):
    file = write(tmp_path / "train.csv", GOOD, changed(**{"id": "2", **cells}))
    with pytest.raises(UserError, match=says):
        read_battles(file, labelled=True)


def test_a_row_cut_short_an_open_quote_and_other_bytes_are_named(tmp_path):
    file = write(tmp_path / "train.csv", GOOD, GOOD[:4])
    with pytest.raises(UserError, match=r"row 2 .*4 cells, 9 columns"):
        read_battles(file, labelled=True)
    file.write_text(",".join([*HEADER, *FLAGS]) + '\n1,x,y,"[""never closed', encoding="utf-8")
    with pytest.raises(UserError, match="row 1, is not CSV"):
        read_battles(file, labelled=True)
    file.write_bytes(",".join(HEADER).encode() + b"\n\xff")
    with pytest.raises(UserError, match="UTF-8"):
        read_battles(file, labelled=False)


def test_missing_columns_rows_and_files_are_named(tmp_path):
    with pytest.raises(UserError, match="lacks the column 'winner_model_a'"):
        read_battles(write(tmp_path / "test.csv", GOOD[:6], header=HEADER), labelled=True)
    assert len(read_battles(tmp_path / "test.csv", labelled=False)) == 1
    with pytest.raises(UserError, match=r"dataset_name: .* has no train\.csv"):
        read_competition(tmp_path)
    with pytest.raises(UserError, match="holds no rows"):
        read_battles(write(tmp_path / "train.csv"), labelled=True)


def test_exchanged_answers_exchange_the_winner_and_share_the_group():
    battle = Battle("1", ("Q",), ("one",), ("two",), WINS_A)
    assert swapped(battle) == Battle("1", ("Q",), ("two",), ("one",), WINS_B)
    assert swapped(swapped(battle)) == battle
    assert swapped(Battle("1", ("Q",), ("a",), ("b",), TIE)).label == TIE
    empty = Battle("1", (" ",), ("one",), ("two",))
    assert swapped(battle).group() == battle.group() == Battle("2", (" q\n",), ("x",), ("y",)).group()
    assert swapped(empty).group() == empty.group() != Battle("2", ("",), ("one",), ("three",)).group()


def test_the_real_files_are_read_as_pandas_reads_them(shared_data):
    import pandas

    for name, labelled in (("train.csv", True), ("test.csv", False)):
        found = read_battles(shared_data / "arena" / name, labelled=labelled)
        table = pandas.read_csv(shared_data / "arena" / name, dtype=str, keep_default_na=False)
        assert [battle.id for battle in found.battles] == table["id"].tolist()
        for column, field in (("prompt", "prompt"), ("response_a", "answer_a"), ("response_b", "answer_b")):
            assert [list(getattr(battle, field)) for battle in found.battles] == table[column].map(json.loads).tolist()
        if labelled:
            assert found.labels.tolist() == table[FLAGS].astype(int).to_numpy().argmax(axis=1).tolist()
