"""Tables as spreadsheets, warehouses and Windows programs export them: what is read, and which place is named."""

import gzip
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from isotune.config.layers import read_file
from isotune.data.class_index import label_of
from isotune.data.classification.targets import numbers_of
from isotune.data.sources.source import read_rows
from isotune.io.errors import UserError

ROWS = [{"text": "a", "label": "1"}, {"text": "b", "label": "0"}]


def written(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


@pytest.mark.parametrize(
    ("content", "notes"),
    [
        ("sep=;\ntext;label\na;1\nb;0\n", ["t.csv: cells end at ';', as line 1 says"]),
        ('"sep=\t"\r\ntext\tlabel\r\na\t1\r\nb\t0\r\n', ["t.csv: cells end at '\\t', as line 1 says"]),
        ("SEP=,\ntext,label\na,1\nb,0\n", ["t.csv: cells end at ',', as line 1 says"]),
        ("text,label,,\na,1,,\nb,0, ,\n", ["t.csv: 2 empty columns at the end"]),
        ("text;label;;\na;1;;\nb;0;;\n", ["t.csv: cells end at ';'", "t.csv: 2 empty columns at the end"]),
        ("text,label,\na,1,\n\nb,0,\n", ["t.csv: 1 empty lines", "t.csv: 1 empty columns at the end"]),
    ],
)
def test_a_table_of_a_spreadsheet_is_read_and_what_was_passed_over_is_said(tmp_path, content, notes):
    source = read_rows(written(tmp_path / "t.csv", content))
    assert list(source.rows()) == ROWS and source.notes == notes


def test_a_last_column_without_a_name_that_holds_something_is_kept_or_refused(tmp_path):
    kept = read_rows(written(tmp_path / "one.csv", "text,label,\na,1,x\n"))
    assert list(kept.rows()) == [{"text": "a", "label": "1", "": "x"}]
    stray = read_rows(written(tmp_path / "two.csv", "text,label,,\na,1,,\nb,0,x,\n"))
    with pytest.raises(UserError, match=r"two.csv line 3 \(row 2\) has 'x' in a column without a name"):
        list(stray.rows())


def test_a_delimiter_that_the_file_declares_is_the_only_one(tmp_path):
    source = read_rows(written(tmp_path / "t.csv", "sep=;\ntext;label\na;1\nb\n"))
    with pytest.raises(UserError, match=r"t.csv line 4 \(row 2\) has 1 cells, and line 2 names 2 columns"):
        list(source.rows())


def binary(*cells: bytes | None, kind: pa.DataType | None = None) -> pa.Array:
    return pa.array(cells, kind or pa.binary())


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view()])
def test_texts_in_a_column_that_is_not_marked_as_text_are_texts(tmp_path, kind):
    with pa.OSFile(str(tmp_path / "t.arrow"), "wb") as file:
        table = pa.table({"text": binary(b"caf\xc3\xa9", None, b"b", kind=kind), "label": [0, 1, 1]})
        with pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    assert [row["text"] for row in read_rows(str(tmp_path / "t.arrow")).rows()] == ["café", None, "b"]


def test_decimals_are_numbers(tmp_path):
    labels = pa.array([Decimal(1), Decimal(0), None], pa.decimal128(10, 0))
    scores = pa.array([Decimal("1.50"), Decimal("2.00"), None], pa.decimal128(10, 2))
    pq.write_table(pa.table({"label": labels, "score": scores}), tmp_path / "t.parquet")
    rows = list(read_rows(str(tmp_path / "t.parquet")).rows())
    assert [str(row["score"]) for row in rows] == ["1.50", "2.00", "None"]
    assert [(row["label"], type(row["label"])) for row in rows[:2]] == [(1, int), (0, int)]
    assert numbers_of([row["score"] for row in rows[:2]], str, "score").values.tolist() == [1.5, 2.0]
    assert [label_of(row["label"]) for row in rows[:2]] == [1, 0] and label_of(Decimal("2.00")) == 2


def test_a_binary_cell_that_is_no_text_stays_bytes(tmp_path):
    pq.write_table(pa.table({"text": ["a"], "image": binary(b"\x89PNG\xff")}), tmp_path / "t.parquet")
    assert list(read_rows(str(tmp_path / "t.parquet")).rows()) == [{"text": "a", "image": b"\x89PNG\xff"}]


def test_a_text_of_parquet_that_is_not_utf8_is_named_by_row_and_column(tmp_path):
    texts = binary(*[b"fine"] * 2_500, b"caf\xe9", b"fine").view(pa.string())
    pq.write_table(pa.table({"label": [0] * 2_502, "text": texts}), tmp_path / "t.parquet")
    with pytest.raises(UserError) as mistake:
        list(read_rows(str(tmp_path / "t.parquet")).rows())
    path = tmp_path / "t.parquet"
    sentence = "row 2501, column 'text', holds the byte 0xe9, which is not UTF-8: save the file as UTF-8"
    assert str(mistake.value) == f"{path} {sentence}"


@pytest.mark.parametrize("name", ["t.json", "t.json.gz"])
def test_a_byte_within_a_row_of_several_lines_is_named_by_its_own_line(tmp_path, name):
    content = b'[\n {\n  "text": "a"\n },\n {\n  "id": 1,\n  "text": "caf\xe9"\n }\n]\n'
    path = written(tmp_path / name, gzip.compress(content) if name.endswith("gz") else content)
    with pytest.raises(UserError, match=r"line 7 \(row 2\).*holds the byte 0xe9, which is not UTF-8"):
        list(read_rows(path).rows())


def test_a_recipe_that_is_not_utf8_is_named_by_line_and_byte(tmp_path):
    file = Path(written(tmp_path / "r.yaml", yaml.safe_dump({"seed": 1}).encode() + b"run_name: caf\xe9\n"))
    with pytest.raises(UserError, match="line 2 holds the byte 0xe9, which is not UTF-8"):
        read_file(file)
