"""A folder whose README.md names configurations, as a clone from the Hub has, is read as `datasets` reads it."""

import json
import shutil
from pathlib import Path

import datasets
import pytest
from tests.launching import TINY_CLASSIFIER, start

from isotune.commands.trained import evaluate_classifier, generate, predict
from isotune.config import Recipe
from isotune.data.sources.source import read_rows
from isotune.evaluation.tasks import FLAGS
from isotune.io.errors import UserError
from isotune.run.identity import RunIdentity


def clone(folder: Path, card: str, *names: str) -> str:
    """A folder of files that hold their own names, a row each, with a card."""
    for name in names:
        path = folder / "clone" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"text": name}) + "\n")
    (folder / "clone").mkdir(exist_ok=True)
    (folder / "clone" / "README.md").write_text(f"---\nlicense: mit\n{card}---\n# A data set\n")
    return str(folder / "clone")


def texts(folder: str, split: str = "train", **which) -> list[str]:
    return [row["text"] for row in read_rows(folder, split, **which).rows()]


SPLITS = """configs:
- config_name: plain
  data_files:
  - split: train
    path: [part1/*.jsonl, part2/b*.jsonl]
  - split: heldout
    path: rest/**
"""
FILES = ("part1/a.jsonl", "part1/b.jsonl", "part2/a.jsonl", "part2/b.jsonl", "rest/deep/a.jsonl", "train.jsonl")


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_the_only_configuration_is_the_default_and_its_patterns_say_the_files(tmp_path, split, monkeypatch):
    folder = clone(tmp_path, SPLITS, *FILES)
    theirs = datasets.load_dataset(folder, split=split, cache_dir=str(tmp_path / "theirs"))["text"]
    assert texts(folder, split) == texts(folder, split, config="plain") == list(theirs)
    assert "train.jsonl" not in theirs  # which the names of files alone would have taken


TWO = """configs:
- config_name: en
  data_files: en/*.jsonl
- config_name: fr
  data_files:
  - {split: train, path: fr/*.jsonl}
"""


def test_one_of_several_configurations_is_chosen_by_its_name(tmp_path):
    folder = clone(tmp_path, TWO, "en/x.jsonl", "fr/y.jsonl")
    assert texts(folder, config="fr") == ["fr/y.jsonl"] and texts(folder, config="en") == ["en/x.jsonl"]
    with pytest.raises(UserError, match=rf"^dataset_name: '{folder}' has several .* by dataset_config: en, fr$"):
        texts(folder)
    with pytest.raises(UserError, match=r"^eval_dataset_name: .* choose one by eval_dataset_config: en, fr$"):
        texts(folder, name="eval_dataset_name")
    with pytest.raises(UserError, match=r"has no configuration 'it'; it has en, fr$"):
        texts(folder, config="it")
    with pytest.raises(UserError, match=r"has no split 'test'; it has train$"):
        texts(folder, "test", config="fr")


@pytest.mark.parametrize("said", ["- config_name: default\n  data_files: fr/*", "  default: true\n"])
def test_the_default_of_several_is_read_where_the_card_names_one(tmp_path, said):
    card = TWO + said if said.startswith("  ") else TWO.replace("- config_name: fr", said + "\n- config_name: fr")
    assert texts(clone(tmp_path, card, "en/x.jsonl", "fr/y.jsonl")) == ["fr/y.jsonl"]


# merge keys that would stand for ten to the power of ten pairs
BOMB = "a0: &a0 {x: 1}\n" + "".join(
    f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}\n" for n in range(1, 11)
) + "configs: 1\n"  # fmt: skip


@pytest.mark.parametrize(
    ("card", "said"),
    [
        ("configs: [\n", "README.md begins with lines that are not YAML"),
        ("configs: 1\ndate: 2024-13-45\n", "README.md begins with lines that are not YAML: month must be in 1..12"),
        ("configs: " + "[" * 5_000 + "\n", "README.md begins with lines that are not YAML: it is nested deeper"),
        ("configs: &a {<<: *a}\n", "README.md begins with lines that are not YAML: a value holds itself"),
        (BOMB, "README.md begins with lines that are not YAML: its aliases stand for more than"),
        ("configs:\n- config_name: a\n  data_files: none/*.jsonl\n", "dataset_name: '.*clone' cannot be read: "),
        ("configs:\n- config_name: a\n  data_files: {train: x}\n", "dataset_name: '.*clone' cannot be read: "),
        ("configs:\n- config_name: a\n  data_files: ../outside.jsonl\n", "lie outside it, at .*outside.jsonl"),
    ],
)
def test_a_card_that_cannot_be_followed_is_one_sentence(tmp_path, card, said):
    (tmp_path / "outside.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(UserError, match=said) as refused:
        texts(clone(tmp_path, card, "train.jsonl"))
    assert "\n" not in str(refused.value)


def test_without_configurations_in_the_card_a_configuration_is_a_folder(tmp_path):
    folder = clone(tmp_path, "tags: [x]\n", "en/train.jsonl", "fr/train.jsonl")
    assert texts(folder, config="fr") == ["fr/train.jsonl"]
    with pytest.raises(UserError, match=r"^dataset_config: .* has no folder 'it', and no README.md that names conf"):
        texts(folder, config="it")


def test_a_pointer_of_git_lfs_says_what_it_is(tmp_path):
    folder = Path(clone(tmp_path, SPLITS, *FILES))
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    (folder / "part1" / "a.jsonl").write_text(pointer)
    with pytest.raises(UserError, match=r"part1/a.jsonl is a pointer of Git LFS .* `git lfs pull`"):
        texts(str(folder))


NAMED = """dataset_info:
  features:
  - name: text
    dtype: string
  - name: label
    dtype: {class_label: {names: {'0': sad, '1': glad}}}
configs:
- config_name: default
  data_files: rows.csv
"""


def test_the_names_of_classes_that_a_card_gives_are_those_of_the_run(tmp_path):
    folder = Path(clone(tmp_path, NAMED))
    (folder / "rows.csv").write_text("text,label\n" + "a fine day,1\na grey day,0\n" * 4)
    recipe = {**TINY_CLASSIFIER, "dataset_name": str(folder), "eval_dataset_name": None, "max_steps": 1}
    done = start(tmp_path, recipe, script="train/yelp.py")
    assert "of class 0, sad" in done.stdout and "of class 1, glad" in done.stdout
    assert json.loads((done.run / "model" / "config.json").read_text())["id2label"] == {"0": "sad", "1": "glad"}


def test_a_clone_that_moved_is_the_same_data_and_another_configuration_is_not(tmp_path):
    folder = clone(tmp_path, TWO, "en/x.jsonl", "fr/y.jsonl")
    shutil.copytree(folder, tmp_path / "moved")

    def identity(name: str, config: str) -> str:
        values = {"model_name_or_path": "a/model", "output_dir": "x", "dataset_name": name, "dataset_config": config}
        return RunIdentity.of(Recipe.from_values(**values)).fingerprint

    assert identity(folder, "en") == identity(str(tmp_path / "moved"), "en") != identity(folder, "fr")


FEATURES = """
  features:
  - name: text
    dtype: string
  - name: label
    dtype:
      class_label:
        names:
          '0': negative
          '10': last
          '2': positive
  - name: topics
    sequence:
      class_label:
        names: [sea, land]
"""


def test_names_of_classes_in_a_card_without_configurations_are_those_of_the_data(tmp_path):
    folder = clone(tmp_path, f"dataset_info:{FEATURES}", "train.jsonl")
    names = {"label": (("negative", "positive", "last"),), "topics": (("sea", "land"),)}
    assert read_rows(folder).class_names == names
    of_two = "".join(f"- config_name: {own}{FEATURES}" for own in ("en", "fr"))
    folder = clone(tmp_path / "two", f"dataset_info:\n{of_two}", "en/train.jsonl", "fr/train.jsonl")
    assert read_rows(folder, config="fr").class_names == names


def test_names_of_classes_that_an_older_data_set_lists_beside_itself_are_those_of_the_data(tmp_path):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    folder = clone(tmp_path, "", "train.jsonl")
    infos = {"default": {"features": features.to_dict()}}
    Path(folder, "dataset_infos.json").write_text(json.dumps(infos))
    assert read_rows(folder).class_names == {"label": (("no", "yes"),)}
    Path(folder, "dataset_infos.json").write_text("[" * 100_000)
    assert read_rows(folder).class_names == {}
    Path(folder, "dataset_infos.json").write_text(json.dumps({**infos, "other": infos["default"]}))
    assert read_rows(folder).class_names == {}  # nobody says which


@pytest.mark.parametrize(
    "card",
    ["dataset_info: 3\n", "dataset_info:\n- features: [1]\n", "a: [\n", "a: " + "[" * 5_000, "date: 2024-13-45\n",
     "dataset_info: {features: [{name: a, dtype: {class_label: {names: {.inf: x}}}}]}\n"],
)  # fmt: skip
def test_a_card_that_says_nothing_of_use_is_passed_over(tmp_path, card):
    folder = clone(tmp_path, card, "train.jsonl")
    assert read_rows(folder).class_names == {} and texts(folder) == ["train.jsonl"]


SHARDS = [f"data/train-{number:05d}-of-00003.jsonl" for number in range(3)]
GLOB = "configs:\n- config_name: default\n  data_files:\n  - {split: train, path: data/train-*}\n"


def test_a_missing_shard_of_a_clone_is_refused_and_one_that_the_card_leaves_out_is_not(tmp_path):
    folder = clone(tmp_path, GLOB, *SHARDS)
    assert texts(folder) == SHARDS
    Path(folder, SHARDS[1]).unlink()
    with pytest.raises(UserError, match=r"lacks 1 of the 3 shards of 'train', first train-00001-of-00003.jsonl: fetch"):
        texts(folder)
    chosen = clone(tmp_path / "sample", GLOB.replace("data/train-*", "'data/train-0000[02]*'"), *SHARDS)
    assert texts(chosen) == [SHARDS[0], SHARDS[2]]
    one = clone(tmp_path / "one", GLOB.replace("data/train-*", SHARDS[0]), SHARDS[0])
    assert texts(one) == SHARDS[:1]


def test_rows_that_are_not_as_many_as_the_card_counts_are_said(tmp_path):
    counted = "dataset_info:\n  features:\n  - {name: text, dtype: string}\n  splits:\n"
    counted += "  - {name: train, num_bytes: 9, num_examples: 4}\n  download_size: 9\n  dataset_size: 9\n"
    source = read_rows(clone(tmp_path, GLOB + counted, *SHARDS))
    for _ in range(2):
        assert len(list(source.rows())) == 3
        assert [note for note in source.notes if "has 3 rows, and its card counts 4" in note] == source.notes != []
    Path(tmp_path, "clone", "README.md").write_text(f"---\n{GLOB}{counted.replace('examples: 4', 'examples: 3')}---\n")
    right = read_rows(str(tmp_path / "clone"))
    assert len(list(right.rows())) == 3 and not right.notes


def test_several_configurations_are_chosen_by_the_key_or_flag_beside_the_one_that_names_the_data(tmp_path):
    folder = clone(tmp_path, TWO, "en/a.jsonl", "fr/a.jsonl")
    beside = {"eval_dataset_name": "eval_dataset_config", "--input": "--dataset_config"}
    for key, flag in beside.items():
        with pytest.raises(UserError, match=f"has several configurations: choose one by {flag}: en, fr$"):
            read_rows(folder, name=key)
    with pytest.raises(UserError, match=f"^--dataset_revision is for Hub ids, and {folder} is none$"):
        read_rows(folder, name="--input", revision="main")


def test_every_command_on_a_model_takes_the_configuration_and_the_revision():
    words = ["--dataset_config", "fr", "--dataset_revision", "v2"]
    data = {"prog": "x", "description": "x"}
    on_run = ["--run_dir", "r", "--dataset_name", "d", *words]
    given = [
        evaluate_classifier.read_arguments(on_run, **data),
        generate.read_arguments(on_run, **data),
        predict.read_arguments(["--input", "d", "--output", "o.csv", *words]),
    ]
    assert {(one.dataset_config, one.dataset_revision) for one in given} == {("fr", "v2")}
    assert {"dataset_config", "dataset_revision"} <= {*FLAGS}
