"""Every format gives the rows that are in it, however it is written, compressed and encoded."""

import csv
import gzip
import io
import json
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from isotune.config import Recipe
from isotune.data.sft.chat_format import ChatFormat
from isotune.data.sources.files import BorrowedColumns
from isotune.data.sources.source import read_rows
from isotune.io.errors import UserError
from isotune.run.hub import _is_on_hub
from isotune.run.identity import RunIdentity

ROWS = [
    {"id": "007", "text": "NA", "when": "2023-11-01"},
    {"id": "1.0", "text": 'two\nlines, "quoted"; é 😀', "when": ""},
    {"id": " 3 ", "text": "null", "when": "1e5"},
]


def as_csv(delimiter: str = ",", **how) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(ROWS[0]), delimiter=delimiter, **how)
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue()


LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
TEXTS = {
    "lines.jsonl": LINES,
    "lines.json": LINES,
    "array.json": json.dumps(ROWS),
    "array_over_lines.json": json.dumps(ROWS, indent=2),
    "array.jsonl": json.dumps(ROWS),
    "objects_over_lines.json": "\n".join(json.dumps(row, indent=1) for row in ROWS),
    "comma.csv": as_csv(),
    "all_quoted.csv": as_csv(quoting=csv.QUOTE_ALL),
    "semicolon.csv": as_csv(";"),
    "tab.tsv": as_csv("\t"),
}


def compressed(content: bytes, how: str) -> bytes:
    if how == ".gz":
        half = len(content) // 2
        return gzip.compress(content[:half]) + gzip.compress(content[half:])  # as `cat a.gz b.gz` makes it
    return pa.compress(content, codec="zstd", asbytes=True) if how == ".zst" else content


@pytest.mark.parametrize("how", ["", ".gz", ".zst"])
@pytest.mark.parametrize("name", TEXTS)
def test_a_text_file_gives_its_rows(tmp_path, name, how):
    path = tmp_path / (name + how)
    path.write_bytes(compressed(TEXTS[name].encode(), how))
    assert list(read_rows(str(path)).rows()) == ROWS


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["lines.jsonl", "array.json", "comma.csv", "tab.tsv"])
def test_a_byte_order_mark_says_how_a_file_is_encoded(tmp_path, name, encoding):
    path = tmp_path / name
    path.write_bytes(TEXTS[name].encode(encoding))
    assert list(read_rows(str(path)).rows()) == ROWS


@pytest.mark.parametrize("how", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", ["parquet", "stream", "file"])
def test_a_table_of_arrow_gives_its_rows(tmp_path, kind, how):
    table = pa.Table.from_pylist(ROWS)
    plain = tmp_path / "plain"
    if kind == "parquet":
        pq.write_table(table, plain)
    else:
        write = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
        with write(plain, table.schema) as file:
            file.write_table(table)
    path = tmp_path / (f"data.{'parquet' if kind == 'parquet' else 'arrow'}" + how)
    path.write_bytes(compressed(plain.read_bytes(), how))
    assert list(read_rows(str(path)).rows()) == ROWS


def test_a_field_that_is_null_in_a_struct_of_arrow_is_absent_and_a_null_cell_stays(tmp_path):
    messages = [
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tools": [{"name": "f"}]}],
        [{"from": "human", "value": "c"}],
    ]
    rows = [{"messages": messages[0], "score": None}, {"messages": messages[1], "score": 2}]
    pq.write_table(pa.Table.from_pylist(rows, schema=union_schema()), tmp_path / "union.parquet")
    assert list(read_rows(str(tmp_path / "union.parquet")).rows()) == rows


def union_schema() -> pa.Schema:
    text = pa.string()
    tools = pa.list_(pa.struct({"name": text, "arguments": text}))
    message = pa.struct({"role": text, "content": text, "from": text, "value": text, "tools": tools})
    return pa.schema({"messages": pa.list_(message), "score": pa.int64()})


def mistake(path: Path, **how) -> str:
    with pytest.raises(UserError) as caught:
        list(read_rows(str(path), **how).rows())
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            '[{"a": 1},\n {"a": 2}\n {"a": 3}]',
            "line 3 (row 3) is not JSON with rows: a comma or ] is missing after row 2",
        ),
        ('[{"a": 1},\n {"a": 2},\n 3]', "line 3 (row 3) is not JSON with rows: it is a JSON int, not an object"),
        ('[{"a": 1},\n {"a": 2}', "line 2 (row 3) is not JSON with rows: the array does not end"),
        ('[{"a": 1},\n {"a": "2', "line 2 (row 2) is not JSON with rows: Unterminated string"),
        (
            '[{"a": 1},\n {"a" 2}, {"b": "' + "x" * 5_000_000 + '"}]',
            "line 2 (row 2) is not JSON with rows: Expecting ':'",
        ),
        ('[{"a": 1}]\n[]', "line 2 (row 2) is not JSON with rows: something follows the end of the array"),
        ('{"a": 1}\n{"a": \n', "line 2 is not JSON: Expecting value"),
    ],
)
def test_a_broken_row_of_json_is_named_by_line_and_row(tmp_path, content, said):
    path = tmp_path / "broken.json"
    path.write_text(content)
    assert f"{path} {said}" in mistake(path)


@pytest.mark.parametrize("name", ["data.jsonl.gz", "data.csv.zst", "data.parquet.gz"])
def test_a_file_that_was_cut_off_while_it_was_compressed_is_named(tmp_path, name):
    path = tmp_path / name
    content = TEXTS["comma.csv" if "csv" in name else "lines.jsonl"].encode() * 1_000
    path.write_bytes(compressed(content, path.suffix)[:-20])
    said = mistake(path)
    assert str(path) in said and len(said) < 250


def test_a_file_is_read_in_bounded_memory(tmp_path):
    rows = [{"text": "word " * 200, "label": n % 2} for n in range(20_000)]  # 20 MB
    (tmp_path / "a.json").write_text(json.dumps(rows))
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *((row["text"], row["label"]) for row in rows)])
    for name in ("a.json", "a.csv"):
        tracemalloc.start()
        assert sum(1 for _ in read_rows(str(tmp_path / name)).rows()) == len(rows)
        assert tracemalloc.get_traced_memory()[1] < 8e6
        tracemalloc.stop()


def test_a_binary_file_or_one_without_a_byte_order_mark_is_told(tmp_path):
    path = tmp_path / "data.csv"
    path.write_bytes(TEXTS["comma.csv"].encode("utf-16-le"))
    assert mistake(path) == f"{path} is not UTF-8: it is binary, or UTF-16 without a byte order mark; save it as UTF-8"


def test_what_is_guessed_or_left_out_is_noted(tmp_path):
    path, lines = tmp_path / "data.csv", tmp_path / "data.jsonl"
    path.write_text("text;label\n\na;1\n\n")
    lines.write_text('{"a": 1}\n\n \n{"a": 2}\n')
    sources = [read_rows(str(file)) for file in (path, lines)]
    assert [list(source.rows()) for source in sources] == [[{"text": "a", "label": "1"}], [{"a": 1}, {"a": 2}]]
    assert [source.notes for source in sources] == [
        ["data.csv: cells end at ';'", "data.csv: 2 empty lines"],
        ["data.jsonl: 2 empty lines"],
    ]


def test_quotes_of_a_tsv_are_text_where_they_do_not_pair(tmp_path):
    path = tmp_path / "data.tsv"
    for content, expected in {
        '"so" it goes\t1\n': ['"so" it goes'],  # as GLUE has it
        '"one\t1\ntwo"\t0\n': ['"one', 'two"'],  # rows that an unpaired quote would merge
        '"one\ttwo"\t1\n"a\nb"\t0\n': ["one\ttwo", "a\nb"],  # as a spreadsheet writes it
    }.items():
        path.write_text("text\tlabel\n" + content)
        assert [row["text"] for row in read_rows(str(path)).rows()] == expected


@pytest.mark.parametrize(
    "first",
    ['"1","A long review. Really quite long, longer than a name."', "2023-11-01,1", "fine,", "4.5,4.5", '"a\nb",x'],
)
def test_a_csv_without_names_of_columns_says_the_flag_that_names_them(tmp_path, first):
    path = tmp_path / "data.csv"
    path.write_text(f'{first}\n"2","{"x" * 500}"\n')
    (row, *_), source = read_some(path), read_rows(str(path))
    said = str(source.lacks(0, row, "text", "dataset_text_field")) if row else mistake(path)
    assert "line 1 does not name the columns but holds a row (" in said and "--dataset_columns " in said
    assert len(said) < len(str(path)) + 250


def read_some(path: Path) -> list[dict | None]:
    try:
        return list(read_rows(str(path)).rows())
    except UserError:
        return [None]


@pytest.mark.parametrize("header", ["text,label", ",text,label", "0,1,2", ",0,1", "Review Text,Star Rating (1-5)"])
def test_names_of_columns_are_not_taken_for_a_row(tmp_path, header):
    path = tmp_path / "data.csv"
    path.write_text(f"{header}\n{','.join('x' for _ in header.split(','))}\n")
    source = read_rows(str(path))
    (row,) = source.rows()
    assert "it has " in str(source.lacks(0, row, "review", "dataset_text_field"))


def test_columns_without_names_get_those_of_the_recipe(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text('"1","a, b"\n"2","c"\n')
    source = read_rows(str(path), columns=["label", "text"])
    assert list(source.rows()) == [{"label": "1", "text": "a, b"}, {"label": "2", "text": "c"}]
    others = {read_rows(str(path), columns=names).fingerprint for names in (None, ["text", "label"])}
    assert source.fingerprint not in others and len(others) == 2
    path.write_text("1,a,b\n")
    assert "line 1 (row 1) has 3 cells, and dataset_columns names 2 columns" in mistake(path, columns=["label", "text"])
    (tmp_path / "data.jsonl").write_text("{}")
    assert "data.jsonl have names: leave the key out" in mistake(tmp_path / "data.jsonl", columns=["label", "text"])


@pytest.mark.parametrize(
    "header", ["label,text", "Text, Label", "\n  \nlabel;text", "id,text,label", "sep=|\ntext|label"]
)
def test_columns_are_not_named_for_a_file_that_names_them(tmp_path, header):
    path = tmp_path / "data.csv"
    line = header.count("\n") + 1
    path.write_text(f"{header}\n")
    says = f"{path} line {line} names these columns: leave dataset_columns out"
    assert mistake(path, columns=["label", "text"]) == says
    borrowed = read_rows(str(path), columns=BorrowedColumns(["label", "text"]))
    assert borrowed.fingerprint == read_rows(str(path)).fingerprint and borrowed.names_by_line


def test_columns_that_are_borrowed_count_where_a_csv_has_none_of_its_own(tmp_path):
    columns = BorrowedColumns(["label", "text"])
    rows = [{"label": "1", "text": "a"}, {"label": "2", "text": "b"}]
    for name, content in {
        "plain.csv": "1,a\n2,b\n", "named.csv": "text,label\na,1\nb,2\n",
        "rows.jsonl": "".join(json.dumps(row) + "\n" for row in rows),
    }.items():  # fmt: skip
        (tmp_path / name).write_text(content)
        assert list(read_rows(str(tmp_path / name), columns=columns).rows()) == rows
    plain = [read_rows(str(tmp_path / "plain.csv"), columns=own) for own in (columns, list(columns))]
    assert plain[0].fingerprint == plain[1].fingerprint
    assert len(list(read_rows("builtin:greetings", columns=columns).rows())) == 80
    with pytest.raises(UserError, match="the columns of builtin:greetings have names"):
        read_rows("builtin:greetings", columns=list(columns))


@pytest.mark.parametrize("start", ["  \n", "\n", ""])
def test_a_blank_line_before_the_one_name_of_a_csv_leaves_its_rows_as_they_are(tmp_path, start):
    (tmp_path / "one.csv").write_text(f"{start}text\nhello\n  \nworld\n")
    source = read_rows(str(tmp_path / "one.csv"))
    assert [row["text"] for row in source.rows()] == ["hello", "  ", "world"]


@pytest.mark.parametrize("name", ["array.json", "lines.jsonl"])
def test_a_number_of_more_digits_than_python_reads_is_named_by_its_row(tmp_path, name):
    rows = ['{"a": 1}', f'{{"a": {"1" * 5_000}}}']
    (tmp_path / name).write_text(f"[{rows[0]},\n{rows[1]}]" if name == "array.json" else "\n".join(rows))
    assert f"{name} line 2 " in mistake(tmp_path / name) and "4300 digits" in mistake(tmp_path / name)


def test_the_home_of_a_user_that_nobody_knows_holds_no_data():
    for name in ("~nosuchuser/x.csv", "~nosuchuser/folder", "~nosuchuser"):
        with pytest.raises(UserError, match=f"dataset_name: there is no file or folder {name}$"):
            read_rows(name)
    recipe = Recipe.from_values(model_name_or_path="m", dataset_name="~nosuchuser/x.csv", output_dir="o")
    assert RunIdentity.of(recipe).contents == {}
    assert not _is_on_hub("~nosuchuser/x.csv")
    with pytest.raises(UserError, match=r"chat_format: '~nosuchuser/form.jinja' cannot be read"):
        ChatFormat.of("~nosuchuser/form.jinja", None)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_two_columns_of_one_name_in_a_table_of_arrow_are_refused(tmp_path, kind):
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"]), pa.array(["c"])], names=["text", "more", "text"])
    file = tmp_path / f"data.{kind}"
    if kind == "parquet":
        pq.write_table(table, file)
    else:
        with pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
    assert mistake(file) == f"{file} has two columns of the name 'text'"


def test_a_row_is_named_by_its_file_where_there_are_several(tmp_path):
    for number in range(2):
        (tmp_path / f"train-0000{number}-of-00002.jsonl").write_text('{"a": 1}\n{"a": 2}\n')
    source = read_rows(str(tmp_path))
    assert len(list(source.rows())) == 4
    assert source.where(2) == f"row 1 of {tmp_path / 'train-00001-of-00002.jsonl'}"
