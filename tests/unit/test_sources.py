"""Every way that rows can be named, and every way in which that can go wrong."""

import csv
import gzip
import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.launching import run_command

from isotune.data.sources.source import CORPORA, read_rows
from isotune.io.errors import UserError

ROWS = [{"text": '### Human: a,\n"b"\n### Assistant: é 😀', "label": 1}, {"text": "second", "label": 0}]


def write_jsonl(path: Path, rows=ROWS) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def write_csv(path: Path) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(ROWS)
    return path


def write_parquet(path: Path, rows=ROWS) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def mistake(dataset_name, split="train") -> str:
    """The one sentence that reading this ends in."""
    with pytest.raises(UserError) as caught:
        list(read_rows(str(dataset_name), split).rows())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def as_text(rows=ROWS) -> list[dict[str, str]]:
    """Rows as a CSV file has them."""
    return [{name: str(value) for name, value in row.items()} for row in rows]


@pytest.mark.parametrize("write", [write_jsonl, write_csv, write_parquet])
def test_each_kind_of_file_gives_the_same_rows(tmp_path, write):
    path = write(tmp_path / f"data.{write.__name__.removeprefix('write_')}")
    assert list(read_rows(str(path), "whatever").rows()) == (as_text() if write is write_csv else ROWS)
    assert read_rows(str(path)).where(1) == f"row 2 of {path}"


@pytest.mark.parametrize("write", [write_jsonl, write_csv, write_parquet])
def test_a_folder_gives_the_file_of_the_split(tmp_path, write):
    suffix = write.__name__.removeprefix("write_")
    write(tmp_path / f"test.{suffix}")
    (tmp_path / f"train.{suffix}").write_text("not read")
    assert list(read_rows(str(tmp_path), "test").rows()) == (as_text() if write is write_csv else ROWS)


def test_a_cloned_hub_folder_gives_its_shards_in_order(tmp_path):
    (tmp_path / "data").mkdir()
    for number, row in enumerate(ROWS):
        write_parquet(tmp_path / "data" / f"train-{number:05d}-of-00002.parquet", [row])
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", [{"text": "other", "label": 2}])
    assert list(read_rows(str(tmp_path)).rows()) == ROWS


def test_a_saved_data_set_gives_its_rows(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "several")
    assert list(read_rows(str(tmp_path / "one")).rows()) == ROWS
    assert list(read_rows(str(tmp_path / "several")).rows()) == ROWS
    assert "no split 'test'; it has train" in mistake(tmp_path / "several", "test")


SHARD = "data-00000-of-00001.arrow"
DEEP = "[" * 100_000
SAVED = {
    "state.json: a list": ("state.json", "[1]", "state.json cannot be read: it has no keys"),
    "state.json: no name": ("state.json", '{"_data_files": [{}]}', "_data_files.0.filename is .*: field required"),
    "state.json: depth": ("state.json", DEEP, "state.json cannot be read: it is nested deeper than"),
    "state.json: nothing": ("state.json", "", "state.json cannot be read: it is not JSON"),
    "state.json: another key": ("state.json", json.dumps({"_data_files": [{"filename": SHARD}]}), "be read as what"),
    "another folder": ("state.json", '{"_data_files": [{"filename": "../x.arrow"}]}', "names the file '../x.arrow'"),
    "an absolute path": ("state.json", '{"_data_files": [{"filename": "/x.arrow"}]}', "lies outside the folder"),
    "indices elsewhere": ("state.json", '{"_data_files": [], "_indices_data_files": [{"filename": "../x"}]}', "'../x'"),
    "dataset_info.json: a list": ("dataset_info.json", "[1]", "dataset_info.json cannot be read: it has no keys"),
    "dataset_info.json: features": ("dataset_info.json", '{"features": 5}', "features is 5: input should be a valid"),
    "dataset_info.json: a type": (
        "dataset_info.json", '{"features": {"text": {"dtype": "string", "_type": "Nothing"}}}', "be read as what"),
    "splits": ("dataset_dict.json", '{"splits": 5}', "dataset_dict.json cannot be read: splits is 5"),
    "a split elsewhere": ("dataset_dict.json", '{"splits": ["train", "../train"]}', "'../train' is no name"),
}  # fmt: skip


@pytest.mark.parametrize("name", SAVED)
def test_a_saved_data_set_whose_description_is_broken_or_leaves_its_folder_is_one_sentence(tmp_path, name):
    file, content, said = SAVED[name]
    datasets.Dataset.from_dict({"text": ["a", "b"]}).save_to_disk(str(tmp_path / "d"))
    (tmp_path / "x.arrow").write_bytes((tmp_path / "d" / SHARD).read_bytes())
    (tmp_path / "d" / file).write_text(content)
    with pytest.raises(UserError, match=said) as refused:
        list(read_rows(str(tmp_path / "d")).rows())
    assert "\n" not in str(refused.value) and "dataset_name: " in str(refused.value)


def test_a_saved_data_set_that_is_cut_off_anywhere_is_one_sentence(tmp_path):
    datasets.Dataset.from_dict({"text": ["a" * 900, "b" * 900]}).save_to_disk(str(tmp_path / "d"))
    whole = (tmp_path / "d" / SHARD).read_bytes()
    for size in (0, 4, 100, len(whole) // 2, len(whole) - 1_000):
        (tmp_path / "d" / SHARD).write_bytes(whole[:size])
        with pytest.raises(UserError) as refused:
            list(read_rows(str(tmp_path / "d")).rows())
        assert str(tmp_path / "d") in str(refused.value) and "\n" not in str(refused.value)


def test_a_cached_hub_data_set_is_read_offline(tmp_path):
    cache = tmp_path / "cache"
    place = cache / "someone___talks" / "default" / "0.0.0" / "0123456789abcdef"
    place.mkdir(parents=True)
    made = datasets.load_dataset("json", data_files=str(write_jsonl(tmp_path / "x.jsonl")), cache_dir=tmp_path / "made")
    (arrow,) = (Path(file["filename"]) for file in made["train"].cache_files)
    (place / "talks-train.arrow").write_bytes(arrow.read_bytes())
    info = json.loads((arrow.parent / "dataset_info.json").read_text())
    info |= {"config_name": "default", "dataset_name": "talks"}
    (place / "dataset_info.json").write_text(json.dumps(info))
    report = in_new_process("someone/talks", HF_HUB_OFFLINE="1", HF_DATASETS_CACHE=str(cache))
    assert json.loads(report.stdout) == ROWS, report.stderr


def in_new_process(dataset_name: str, before: str = "", **environment: str) -> subprocess.CompletedProcess:
    """Read in a process of its own: the Hub's libraries read their environment when they are imported."""
    program = (
        "import json, sys\n"
        f"from isotune.data.sources.source import read_rows\nfrom isotune.io.errors import run_script\n{before}\n"
        "run_script(lambda: print(json.dumps(list(read_rows(sys.argv[1]).rows()))))"
    )
    return run_command([sys.executable, "-c", program, dataset_name], environment, timeout_seconds=60)


@pytest.mark.parametrize("hub", ["refuses", "is silent", pytest.param("is switched off", marks=pytest.mark.slow)])
def test_a_hub_id_without_the_hub_fails_at_once_and_names_the_offline_ways(tmp_path, hub):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if hub == "is silent":
            listener.listen()
        environment = {"HF_HUB_OFFLINE": "1"} if hub == "is switched off" else {}
        endpoint = f"http://127.0.0.1:{listener.getsockname()[1]}"
        started = time.monotonic()
        impatient = "from isotune.data.sources import hub_access\nhub_access.REACH_SECONDS = 0.5"
        environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path)}
        report = in_new_process("someone/talks", impatient, **environment)
        seconds = time.monotonic() - started
    assert report.returncode == 2
    assert report.stdout == ""
    (line,) = report.stderr.splitlines()
    assert "someone/talks" in line
    for way in ("folder", ".jsonl", ".csv", ".parquet", "builtin:NAME"):
        assert way in line
    assert ("unset it, or give" if environment.get("HF_HUB_OFFLINE") else "HF_HOME") in line
    assert seconds < 30, "imports and one short request, no retries"


def test_broken_json_names_the_file_and_the_line(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": \n')
    assert mistake(path).startswith(f"{path} line 3 is not JSON: ")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b'["a"]\n', "line 1 (row 1) is not JSON with rows: it is a JSON str, not an object"),
        (b'{"text": "a"}\n["b"]\n', "line 2 is a JSON list, not an object"),
        (b'{"id": 1, "text": "\xff"}\n', "line 1, column 'text', holds the byte 0xff, which is not UTF-8"),
        (b'{"text": "a"}\n"\xff\n', "line 2 holds the byte 0xff, which is not UTF-8"),
        (b"[" * 200_000, "line 1 (row 1) is"),
        (b'{"text": "a"}\n' + b"[" * 200_000, "line 2 is nested too deep"),
    ],
)
def test_a_line_that_is_no_row_is_named(tmp_path, content, sentence):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    assert sentence in mistake(path)


TABLES = {
    "columns of pandas": {"text": {"0": "a", "1": "b"}, "label": {"0": 1, "1": 0}},
    "columns": {"text": ["a", "b"], "label": [1, 0]},
    "rows under a name": {"version": "1", "data": [{"text": "a", "label": 1}, {"text": "b", "label": 0}]},
}


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("indent", [None, 1])
def test_a_table_that_is_one_object_of_json_is_read_as_its_rows_and_it_is_said(tmp_path, table, indent):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(TABLES[table], indent=indent))
    source = read_rows(str(file))
    assert list(source.rows()) == [{"text": "a", "label": 1}, {"text": "b", "label": 0}]
    assert len(source.notes) == 1 and source.notes[0].startswith("rows.json: ")


SINGLE_ROWS = [
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    {"prompt": [{"role": "user", "content": "a"}, {"role": "user", "content": "a"}],
     "completion": [{"role": "assistant", "content": "b"}, {"role": "assistant", "content": "b"}]},
    {"input_ids": [1, 2], "labels": [1, 2]},
    {"text": "a", "label": ["x", "y"]},
    {"text": ["a", "b"]},
]  # fmt: skip


@pytest.mark.parametrize("row", SINGLE_ROWS)
def test_a_single_row_stays_one(tmp_path, row):
    assert list(read_rows(str(write_jsonl(tmp_path / "a.jsonl", [row]))).rows()) == [row]


def test_splits_in_one_object_are_refused_by_their_names(tmp_path):
    (tmp_path / "all.json").write_text(json.dumps({"train": ROWS, "test": ROWS}))
    assert "one object with the splits train, test: write each" in mistake(tmp_path / "all.json")


@pytest.mark.parametrize("name", ["a.ndjson", "a.jsonlines", "a.ndjson.gz"])
def test_other_ends_of_json_lines_are_known(tmp_path, name):
    content = write_jsonl(tmp_path / "rows.jsonl").read_bytes()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert list(read_rows(str(tmp_path / name)).rows()) == ROWS


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_line_of_a_txt_file_is_a_row_and_it_is_said(tmp_path, encoding, end):
    lines = ["Ünö", "", " two  ", "three"]
    (tmp_path / "book.txt").write_bytes(end.join(lines).encode(encoding))
    source = read_rows(str(tmp_path / "book.txt"))
    assert list(source.rows()) == [{"text": line} for line in lines]
    assert source.notes == ["book.txt: each line is a row, in the column 'text'"]


def test_a_txt_file_in_a_folder_is_data_only_where_there_is_no_other(tmp_path):
    for name in ("train", "valid"):
        (tmp_path / f"{name}.txt").write_text(f"of {name}\n")
    assert list(read_rows(str(tmp_path)).rows()) == [{"text": "of train"}]
    assert list(read_rows(str(tmp_path), "validation").rows()) == [{"text": "of valid"}]
    write_jsonl(tmp_path / "train.jsonl")
    assert as_text(read_rows(str(tmp_path)).rows()) == as_text()
    assert "has no file for the split 'validation'; it has train" in mistake(tmp_path, "validation")


def test_a_byte_of_a_txt_file_that_is_not_utf8_is_named_by_its_line(tmp_path):
    (tmp_path / "book.txt").write_bytes(b"one\ntwo \xff\n")
    assert mistake(tmp_path / "book.txt").startswith(
        f"{tmp_path / 'book.txt'} line 2 holds the byte 0xff, which is not UTF-8"
    )


def test_a_file_with_the_end_of_another_kind_is_named_as_what_it_is(tmp_path):
    for name, content, kind in (
        ("a.jsonl", gzip.compress(b"{}"), "compressed by gzip (.gz)"), ("b.csv", b"PK\x03\x04xx", "a zip archive"),
        ("c.json", write_parquet(tmp_path / "x.parquet").read_bytes(), "Parquet (.parquet)"),
    ):  # fmt: skip
        (tmp_path / name).write_bytes(content)
        assert f"{name} is no text but {kind}" in mistake(tmp_path / name)


def test_a_byte_order_mark_and_blank_lines_are_no_mistake(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}')
    assert list(read_rows(str(path)).rows()) == [{"text": "a"}, {"text": "b"}]


def test_blanks_before_quoted_cells_are_left_out_where_a_csv_is_unreadable_with_them(tmp_path, shared_data):
    prompts = [row["prompt"] for row in read_rows(str(shared_data / "prompts" / "prompts.csv")).rows()]
    assert len(prompts) == 153 and prompts[0].startswith("I want you to act as a linux terminal. I will type")
    assert prompts[-1].startswith("I want you to act as the Buddha (a.k.a. Siddhārtha Gautama or Buddha Shakyamuni)")
    assert prompts[-1].endswith("supreme perfect awakening?")
    plain, blanks = tmp_path / "plain.csv", tmp_path / "blanks.csv"
    plain.write_text("a,b\n x, 1\n")
    blanks.write_text('a,b\n x, 1\n"y, z", "2, 3"\n')
    assert list(read_rows(str(plain)).rows()) == [{"a": " x", "b": " 1"}]
    assert list(read_rows(str(blanks)).rows()) == [{"a": "x", "b": "1"}, {"a": "y, z", "b": "2, 3"}]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("a,b\n1,2\n\n1,2,3\n", "line 4 (row 2) has 3 cells, and line 1 names 2 columns: '1,2,3'"),
        ('a,b\n"1\n1",2\n3\n', "line 4 (row 2) has 1 cells, and line 1 names 2 columns: '3'"),
        ('a,b\n1,2\n3,"4\n5,6\n', "line 3 is not readable as CSV: unexpected end of data"),
        (
            'a,b\n"1\n1",2\n3,\x92 4\n',
            "line 4 (row 2), column 'b', holds the byte 0x92, which is not UTF-8: save the file as UTF-8",
        ),
        ("a,\xff\n1,2\n", "line 1, a cell, holds the byte 0xff, which is not UTF-8: save the file as UTF-8"),
    ],
)
def test_a_broken_row_of_a_csv_is_named_by_the_line_where_it_begins(tmp_path, content, sentence):
    path = tmp_path / "broken.csv"
    path.write_bytes(content.encode("latin-1"))
    assert mistake(path) == f"{path} {sentence}"


def test_broken_csv_and_parquet_name_the_file(tmp_path):
    ragged, torn = tmp_path / "ragged.csv", tmp_path / "torn.parquet"
    ragged.write_text("a,b\n1,2\n1,2,3\n")
    write_parquet(torn)
    torn.write_bytes(torn.read_bytes()[:-20])
    assert mistake(ragged).startswith(f"{ragged} line ")
    assert mistake(torn).startswith(f"{torn} is not readable as Parquet: ")


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_an_empty_file_is_named(tmp_path, suffix):
    path = tmp_path / f"data.{suffix}"
    path.touch()
    assert mistake(path) == f"{path} is empty"


def test_a_file_without_rows_is_named(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text("text,label\n")
    assert mistake(path) == f"{path} holds no rows"


@pytest.mark.parametrize("name", ["missing.jsonl", "some/where/data.csv", "./folder", "~/no such folder", "a/b/c"])
def test_a_missing_file_or_folder_is_named(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert mistake(name) == f"dataset_name: there is no file or folder {name}"


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "data.pkl").write_bytes(b"\x80\x04N.")
    formats = ".jsonl, .json, .csv, .tsv, .parquet, .arrow, .txt (also .gz or .zst)"
    assert f"is none of {formats}" in mistake(tmp_path / "data.pkl")


def test_a_folder_without_the_split_says_what_it_has(tmp_path):
    assert "file, at any depth; it has no file at all" in mistake(tmp_path)
    (tmp_path / "deep" / "down").mkdir(parents=True)
    (tmp_path / "deep" / "down" / "book.xlsx").touch()
    assert "file, at any depth; it has deep/down/book.xlsx" in mistake(tmp_path)
    write_csv(tmp_path / "test.csv")
    write_csv(tmp_path / "test_labels.csv")
    assert "has no file for the split 'train'; it has test: choose one by dataset_split" in mistake(tmp_path)
    source = read_rows(str(tmp_path), "test")
    assert list(source.rows()) == as_text()
    assert source.notes == ["not read as 'test': test_labels.csv"]


def test_a_split_that_lies_twice_in_a_folder_is_refused(tmp_path):
    write_csv(tmp_path / "train.csv")
    write_jsonl(tmp_path / "train.jsonl")
    assert "more than once (train.csv, train.jsonl): name one file" in mistake(tmp_path)


def test_an_unknown_builtin_names_the_nearest():
    assert "did you mean builtin:greetings?" in mistake("builtin:greting")
    assert "has no split 'dev'; it has train, test" in mistake("builtin:greetings", "dev")


@pytest.mark.parametrize("name", sorted(CORPORA))
def test_no_row_of_a_built_in_test_split_is_in_its_train_split(name):
    train, test = (list(read_rows(f"builtin:{name}", split).rows()) for split in ("train", "test"))
    assert {"train": len(train), "test": len(test)} == CORPORA[name].split_rows
    assert not [row for row in test if row in train]


def test_a_fingerprint_follows_the_content_and_not_the_name(tmp_path):
    one, same, other = (tmp_path / f"{name}.jsonl" for name in ("one", "same", "other"))
    write_jsonl(one), write_jsonl(same), write_jsonl(other, ROWS[:1])
    prints = [read_rows(str(path)).fingerprint for path in (one, same, other)]
    assert prints[0] == prints[1] != prints[2]
    builtin = {read_rows("builtin:greetings", split).fingerprint for split in ("train", "test", "train")}
    assert len(builtin) == 2


def test_a_saved_data_set_whose_bytes_changed_has_another_fingerprint(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path)
    before = read_rows(str(tmp_path)).fingerprint
    (arrow,) = tmp_path.glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes().replace(b"second", b"thirds"))
    assert read_rows(str(tmp_path)).fingerprint != before


def test_real_files_of_each_kind_are_read_as_they_stand(shared_data):
    counts = {
        "guanaco": (("train", 707), ("test", 90)),
        "arena": (("train", 3_307), ("test", 674)),
        "yelp": (("train", 6_000), ("test", 1_000)),
    }
    for folder, splits in counts.items():
        for split, count in splits:
            assert sum(1 for _ in read_rows(str(shared_data / folder), split).rows()) == count
    with (shared_data / "arena" / "train.csv").open(newline="", encoding="utf-8") as file:
        cells = [{name: str(cell) for name, cell in row.items()} for row in csv.DictReader(file)]
    read = [{name: str(cell) for name, cell in row.items()} for row in read_rows(str(shared_data / "arena")).rows()]
    assert read == cells
