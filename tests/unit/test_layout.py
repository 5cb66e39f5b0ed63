"""Which files of a folder are a split: the layouts that the Hub has, and what is refused."""

from pathlib import Path

import pytest

from isotune.data.sources.source import read_rows
from isotune.io.errors import UserError

IMDB = ["plain_text/train-00000-of-00001.jsonl", "plain_text/unsupervised-00000-of-00001.jsonl"]
HASH = "0d1e2f3a4b5c6d7e"


def folder_of(tmp_path: Path, names: list[str]) -> str:
    """A folder whose files hold their own names, a row each."""
    for name in names:
        path = tmp_path / "data set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'{{"file": "{name}"}}\n')
    return str(tmp_path / "data set")


def files_of(folder: str, split: str) -> list[str]:
    return [row["file"] for row in read_rows(folder, split).rows()]


@pytest.mark.parametrize(
    ("names", "split", "expected"),
    [
        (["train.jsonl", "test.jsonl"], "test", ["test.jsonl"]),
        (["plain_text/train-00000-of-00001.jsonl", "plain_text/unsupervised-00000-of-00001.jsonl"], "train", [0]),
        (
            ["plain_text/train-00000-of-00001.jsonl", "plain_text/unsupervised-00000-of-00001.jsonl"],
            "unsupervised",
            [1],
        ),
        (["default/train/0001.jsonl", "default/train/0000.jsonl", "default/test/0000.jsonl"], "train", [1, 0]),
        ([f"data/train-00000-of-00001-{HASH}.jsonl", f"data/test-00000-of-00001-{HASH[::-1]}.jsonl"], "train", [0]),
        (["best_replies_train.jsonl", "best_replies_eval.jsonl"], "train", [0]),
        (["best_replies_train.jsonl", "best_replies_eval.jsonl"], "test", [1]),
        (["dev.jsonl", "train.jsonl"], "validation", ["dev.jsonl"]),
        (["validation.jsonl", "train.jsonl"], "dev", ["validation.jsonl"]),
        (["alpaca_data_cleaned.json"], "train", [0]),
        (["part-10.jsonl", "part-2.jsonl"], "train", [1, 0]),
        (["part-1-of-2.jsonl", "part-2-of-2.jsonl"], "train", [0, 1]),
        (["data.jsonl", "dataset_infos.json", ".cache/train.jsonl"], "train", [0]),
        (["train_data/part-0.jsonl", "test_data/part-0.jsonl"], "test", [1]),
        (["en/easy/hard.jsonl", "en/easy/train.jsonl"], "hard", [0]),
        (["train.jsonl", "contest.jsonl"], "train", [0]),  # test is no word of contest
    ],
)
def test_the_files_of_a_split_are_found_in_order(tmp_path, names, split, expected):
    wanted = [names[entry] if isinstance(entry, int) else entry for entry in expected]
    assert files_of(folder_of(tmp_path, names), split) == wanted


@pytest.mark.parametrize(
    ("names", "split", "said"),
    [
        (["train.jsonl", "validation.jsonl"], "test", "it has train, validation: choose one by dataset_split"),
        (["a.jsonl"], "test", "has no file for the split 'test'; it has a: choose"),
        (["a.jsonl", "b.jsonl"], "train", "more than once (a.jsonl, b.jsonl): name one file"),
        (["easy/train.jsonl", "hard/train.jsonl"], "train", "more than once (easy/train.jsonl, hard/train.jsonl)"),
        (["train.jsonl", "train-00000-of-00001.jsonl"], "train", "more than once"),
        (["train-00000-of-00003.jsonl", "train-00002-of-00003.jsonl"], "train",
         "lacks 1 of the 3 shards of 'train', first train-00001-of-00003.jsonl: fetch it"),
        ([f"train-00000-of-00001-{HASH}.jsonl", f"train-00000-of-00001-{HASH[::-1]}.jsonl"], "train", "two tables"),
        (["train-00000-of-00002.jsonl", "train-00001-of-00003.jsonl"], "train", "two tables 'train'"),
        (["train_fold0.jsonl", "train_fold1.jsonl"], "train", "more than once (train_fold0.jsonl, train_fold1.jsonl)"),
        (["train-v1.0.jsonl", "train-v1.1.jsonl"], "train", "more than once"),
        (["train_10k.jsonl", "train_100k.jsonl"], "train", "more than once (train_100k.jsonl, train_10k.jsonl)"),
        (["seed1/train.jsonl", "seed2/train.jsonl"], "train", "more than once"),
        (["train/a-00001-of-00002.jsonl"], "train", "lacks 1 of the 2 shards of 'a', first a-00000-of-00002.jsonl"),
    ],
)  # fmt: skip
def test_what_is_no_single_table_is_refused_with_what_is_there(tmp_path, names, split, said):
    with pytest.raises(UserError) as caught:
        files_of(folder_of(tmp_path, names), split)
    assert said in str(caught.value)


def test_a_folder_that_is_a_link_is_read_once(tmp_path):
    folder = Path(folder_of(tmp_path, ["readme/notes.md"]))
    far = tmp_path / "scratch" / "deep"
    far.mkdir(parents=True)
    (far / "train.jsonl").write_text('{"file": "far"}\n')
    for link, target in (("data", far.parent), ("more", far.parent), ("loop", folder), ("again", folder / "readme")):
        (folder / link).symlink_to(target)
    (far / "back").symlink_to(folder)
    assert files_of(str(folder), "train") == ["far"]
    (folder / "readme" / "train.jsonl").write_text('{"file": "near"}\n')
    for link in ("data", "more"):
        (folder / link).unlink()
    assert files_of(str(folder), "train") == ["near"], "a link beside what it leads to adds nothing"


def test_files_of_the_split_that_are_not_read_are_noted(tmp_path):
    folder = folder_of(tmp_path, ["train.jsonl", "train_extra.jsonl"])
    source = read_rows(folder)
    assert len(list(source.rows())) == 1
    assert source.notes == ["not read as 'train': train_extra.jsonl"]


@pytest.mark.parametrize(
    "parts", [["train_v2_part0.jsonl", "train_v2_part1.jsonl"], ["train-10k-0.jsonl", "train-10k-1.jsonl"],
              ["train_sample_00.jsonl", "train_sample_01.jsonl"]])  # fmt: skip
def test_a_number_that_tells_tables_apart_hides_none_that_numbers_their_parts(tmp_path, parts):
    assert files_of(folder_of(tmp_path, parts), "train") == parts


def test_files_that_are_numbered_without_their_count_are_said(tmp_path):
    parts = ["train/part-00002-ab.jsonl", "train/part-00010-ab.jsonl"]
    source = read_rows(folder_of(tmp_path, [*parts[::-1], "train/_SUCCESS"]))
    assert [row["file"] for row in source.rows()] == parts
    assert source.notes == ["read together as 'train': train/part-00002-ab.jsonl, train/part-00010-ab.jsonl"]


def test_an_evaluation_set_is_asked_for_by_its_own_key(tmp_path):
    folder = folder_of(tmp_path, ["train.jsonl", "validation.jsonl"])
    with pytest.raises(UserError, match=r"eval_dataset_name: .*: choose one by eval_dataset_split"):
        read_rows(folder, "test", name="eval_dataset_name")
