"""`dataset_mixture`: several sources as one, the same rows in any launch, counted by source and told by content."""

import json
import shutil
import sys
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import yaml
from tests.launching import TINY, TINY_CLASSIFIER, run_command, start
from trl.scripts.utils import DatasetConfig, DatasetMixtureConfig, get_dataset

from isotune.config import Recipe, read_recipe
from isotune.data.cache import cache_folder
from isotune.data.mixture import open_mixture
from isotune.io.errors import UserError
from isotune.report.model_card import write_model_card
from isotune.run.identity import RunIdentity

REQUIRED = {"model_name_or_path": "a/model", "output_dir": "runs/x"}


@pytest.fixture
def three(tmp_path, monkeypatch) -> Path:
    """Files of 10, 20 and 30 rows; the row `n` of the file x has the text `x n`."""
    for name, count in {"a": 10, "b": 20, "c": 30}.items():
        rows = ({"text": f"{name} {n}", "more": n} for n in range(count))
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipe_of(value, **others) -> Recipe:
    return Recipe.from_values(**REQUIRED, dataset_mixture=value, **others)


def texts_of(value, seed: int = 42) -> list[str]:
    recipe = recipe_of(value, seed=seed)
    return [row["text"] for row in open_mixture(recipe.dataset_mixture or [], recipe.seed).rows()]


def counted(value, seed: int = 42) -> Counter[str]:
    return Counter(text.split()[0] for text in texts_of(value, seed))


def test_a_weight_is_how_often_the_rows_of_a_source_are_read(three):
    found = texts_of([{"dataset_name": "a.jsonl"}, {"path": "b.jsonl", "weight": 0.5}, {"id": "c.jsonl", "weight": 2}])
    assert Counter(text.split()[0] for text in found) == {"a": 10, "b": 10, "c": 60}
    of = {name: Counter(text for text in found if text.startswith(name)) for name in "abc"}
    assert set(of["a"].values()) == {1} and set(of["b"].values()) == {1} and set(of["c"].values()) == {2}
    more = Counter(texts_of({"a.jsonl": 2.5}))
    assert len(more) == 10 and Counter(more.values()) == {2: 5, 3: 5}


@pytest.mark.parametrize(
    ("words", "same"),
    [
        (['{"a.jsonl": 2}', '{"b.jsonl": 0.5, "c.jsonl": 1}'], {"a.jsonl": 2, "b.jsonl": 0.5, "c.jsonl": 1}),
        (['{"dataset_name": "a.jsonl", "weight": 2}', "b.jsonl"], {"a.jsonl": 2, "b.jsonl": 1}),
        (['{"path": "a.jsonl", "weight": 2}'], {"a.jsonl": 2}),
        (['[{"id": "a.jsonl"}, "b.jsonl"]'], {"a.jsonl": 1, "b.jsonl": 1}),
        (['{"a.jsonl": 2}'], {"a.jsonl": 2}),
        (['{"id": 2, "c.jsonl": 1}'], {"id": 2, "c.jsonl": 1}),
    ],
)
def test_words_of_json_are_the_data_sets_of_a_flag(words, same):
    others = [word for key, value in REQUIRED.items() for word in (f"--{key}", value)]
    read = read_recipe(["--dataset_mixture", *words, *others], default_config=None, prog="sft", description="")
    assert read.dataset_mixture == recipe_of(same).dataset_mixture


@pytest.mark.parametrize("fractions", [(0.5, 0.3, 0.2), (1, 1, 1), (0.2, 0.2, 0.6), (9, 1, 5)])
def test_trls_fractions_give_as_many_rows_of_each_source_as_in_trl(three, fractions):
    entries = [{"path": f"{name}.jsonl", "fraction": own} for name, own in zip("abc", fractions, strict=True)]
    files = [{"path": "json", "data_files": str(three / own["path"]), "fraction": own["fraction"]} for own in entries]
    datasets.disable_progress_bars()
    theirs = get_dataset(DatasetMixtureConfig(datasets=[DatasetConfig(**own) for own in files]))["train"]
    assert counted(entries) == Counter(text.split()[0] for text in theirs["text"])
    assert texts_of({"datasets": files}) == texts_of(entries)  # TRL's way to name a file


def test_the_choice_depends_on_the_seed_and_the_content_alone(three):
    half = {"dataset_name": "c.jsonl", "weight": 0.5}
    chosen = texts_of([half])
    assert texts_of([half]) == chosen != texts_of([half], seed=43) and len(set(chosen)) == 15
    assert [text for text in texts_of([{"dataset_name": "a.jsonl"}, half]) if text[0] == "c"] == chosen
    shutil.copy("c.jsonl", "elsewhere.jsonl")
    assert texts_of([{**half, "dataset_name": "elsewhere.jsonl"}]) == chosen
    again = texts_of([half, half])  # two draws from one source are two draws
    assert again[:15] == chosen != again[15:]


def test_a_bad_row_is_named_by_its_own_file_and_place(three):
    mixture = open_mixture(recipe_of({"a.jsonl": 1, "c.jsonl": 0.5}).dataset_mixture or [], 42)
    rows = list(mixture.rows())
    for number, row in enumerate(rows):
        file, own = row["text"].split()
        assert mixture.where(number) == f"row {int(own) + 1} of {file}.jsonl"
    assert "row 1 of a.jsonl lacks the column 'x'" in str(mixture.lacks(0, rows[0], "x", "dataset_text_field"))


def test_columns_of_a_data_set_are_those_that_are_kept(three):
    recipe = recipe_of([{"path": "a.jsonl", "columns": ["text"]}, "b.jsonl"])
    names = [sorted(row) for row in open_mixture(recipe.dataset_mixture or [], 0).rows()]
    assert names == [["text"]] * 10 + [["more", "text"]] * 20
    with pytest.raises(UserError, match=r"row 1 of a.jsonl lacks the column 'txt'.* columns"):
        list(open_mixture(recipe_of([{"path": "a.jsonl", "columns": ["txt"]}]).dataset_mixture or [], 0).rows())


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("{}", "at least one data set"),
        ("a.jsonl", "as a flag it takes JSON"),
        ("[3]", "data set 1 is 3, not a name"),
        ('[{"weight": 1}]', "data set 1 has no dataset_name"),
        ('["x", {"path": "y", "wieght": 1}]', "data set 2 has the key 'wieght': did you mean 'weight'"),
        ('[{"path": "x", "weight": 0}]', "data set 1: weight is 0: it takes a number above 0"),
        ('[{"path": "x", "weight": "much"}]', "it takes a number above 0"),
        ('[{"path": "x", "id": "y"}]', "says dataset_name twice"),
        ('[{"path": "x", "fraction": 0.5}, "y"]', "fraction is said of some"),
        ('[{"path": "x", "fraction": 0.5, "weight": 1}]', "weight, a share of its own rows, and fraction"),
        ('{"datasets": ["x"], "streaming": true}', "leave streaming out: rows are read in bounded memory"),
        ('{"datasets": ["x"], "seed": 3}', "the recipe's seed chooses"),
        ('{"datasets": ["x"], "test_split_size": 0.1}', "say eval_dataset_name"),
        ('[{"path": "OWNER/NAME", "data_files": "x.json"}]', "data_files and data_dir name one file"),
    ],
)
def test_a_mistake_is_one_sentence(value, said):
    flags = [word for key, own in REQUIRED.items() for word in (f"--{key}", own)]
    with pytest.raises(UserError) as refused:
        read_recipe([*flags, "--dataset_mixture", value], default_config=None, prog="p", description="A test.")
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_streaming_is_refused_with_the_way_out():
    for key in ("streaming", "dataset_streaming"):
        with pytest.raises(UserError, match=f"{key} is not a key here: rows are read in bounded memory"):
            Recipe.from_values(**REQUIRED, dataset_name="x", **{key: True})


def test_a_mixture_takes_the_place_of_one_name_and_both_are_refused(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump({**REQUIRED, "dataset_name": "x/y", "dataset_split": "all"}))
    read = {"default_config": file, "prog": "p", "description": "A test."}
    recipe = read_recipe(["--datasets", '{"a.jsonl": 1}'], **read)
    resolved = recipe.resolved()
    assert resolved["dataset_mixture"] == [{"dataset_name": "a.jsonl", "weight": 1.0}]
    assert not {"dataset_name", "dataset_split"} & resolved.keys()
    assert read_recipe(["--dataset_name", "z/w"], **read).dataset_mixture is None
    with pytest.raises(UserError, match="contradict each other: keep one"):
        Recipe.from_values(**REQUIRED, dataset_name="x", dataset_mixture={"a.jsonl": 1})
    with pytest.raises(UserError, match="dataset_config has no effect: each data set of dataset_mixture says its own"):
        recipe_of({"a.jsonl": 1}, dataset_config="x")
    with pytest.raises(UserError, match="dataset_name is missing"):
        Recipe.from_values(**REQUIRED)


def test_a_run_is_told_by_what_its_sources_hold_and_not_by_their_places(three):
    (three / "there").mkdir()
    for name in "ab":
        shutil.copy(f"{name}.jsonl", f"there/{name}.jsonl")
    here = RunIdentity.of(recipe_of({"a.jsonl": 1, "b.jsonl": 0.5}))
    there = RunIdentity.of(recipe_of({"there/a.jsonl": 1, "there/b.jsonl": 0.5}))
    assert here.fingerprint == there.fingerprint and not here.differences(there)
    other = RunIdentity.of(recipe_of({"a.jsonl": 1, "b.jsonl": 0.6}))
    assert other.fingerprint != here.fingerprint
    Path("there/b.jsonl").write_text('{"text": "other"}\n')
    changed = RunIdentity.of(recipe_of({"there/a.jsonl": 1, "there/b.jsonl": 0.5}))
    assert changed.fingerprint != here.fingerprint
    assert "a.jsonl + b.jsonl here" in changed.differences(here)["dataset_mixture"].replace("there/", "")
    opened = [open_mixture([{"dataset_name": f"{name}.jsonl", "weight": 1.0}], 1).fingerprint for name in "ab"]
    assert len(set(opened)) == 2


def test_classes_of_sources_that_number_them_otherwise_are_aligned_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder, names in {"one": ["neg", "pos"], "two": ["Pos", "Neg"]}.items():
        features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
        rows = {"text": [f"{folder} {name}" for name in names], "label": [0, 1]}
        datasets.Dataset.from_dict(rows, features).save_to_disk(folder)
    Path("words.jsonl").write_text('{"text": "words neg", "label": "neg"}\n{"text": "words pos", "label": "POS"}\n')
    recipe = {**TINY_CLASSIFIER, "eval_dataset_name": None, "max_steps": 1, "global_batch_size": 2, "datasets": [
        {"path": "one"}, {"path": "two"}, {"path": "words.jsonl"}]}  # fmt: skip
    del recipe["dataset_name"]
    for own in recipe["datasets"]:
        own["path"] = str(tmp_path / own["path"])
    done = start(tmp_path, recipe, script="train/yelp.py")
    (prepared,) = [each for each in cache_folder().iterdir() if each.is_dir()]
    assert np.load(prepared / "labels.npy").tolist() == [0, 1, 1, 0, 0, 1]
    assert "of class 0, Neg" in done.stdout and "words.jsonl" in done.stdout


def test_a_run_of_a_mixture_prints_and_records_what_each_source_gave_on_any_launch(tmp_path):
    recipe = {**TINY, "max_steps": 2, "dataset_mixture": {"builtin:capitals": 0.01, "builtin:greetings": 0.5}}
    del recipe["dataset_name"]
    alone = start(tmp_path / "alone", recipe)
    both = start(tmp_path / "both", recipe, processes=2)
    assert "of builtin:capitals (train)   60 rows, of 6,000;" in alone.stdout
    assert "of builtin:greetings (train)  40 rows, of 80;" in alone.stdout
    parts = alone.environment["data"]["train"]["mixture"]
    assert [part["documents"] for part in parts] == [60, 40]
    assert sum(part["tokens"] for part in parts) == alone.environment["data"]["train"]["tokens"]
    assert both.environment["data_fingerprints"] == alone.environment["data_fingerprints"]
    for one, other in zip(alone.steps, both.steps, strict=True):
        assert one["input_tokens"] == other["input_tokens"] and one["loss"] == pytest.approx(other["loss"], rel=1e-5)
    card = write_model_card(alone.run).read_text()
    assert "builtin:capitals + builtin:greetings" in card


def test_a_run_evaluates_on_a_mixture_in_the_same_form(tmp_path):
    rows = [{"text": f"a {word} day {n}", "label": n % 2} for n in range(6) for word in ("calm", "wild")]
    for name, own in (("one", rows[:8]), ("two", rows[8:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    mixture = [{"dataset_name": str(tmp_path / f"{name}.jsonl")} for name in ("one", "two")]
    recipe = {**TINY_CLASSIFIER, "max_steps": 2, "dataset_name": mixture[0]["dataset_name"]}
    recipe |= {"eval_dataset_name": None, "eval_dataset_mixture": mixture}
    done = start(tmp_path, recipe, script="train/yelp.py")
    parts = done.environment["data"]["evaluation"]["mixture"]
    assert [part["documents"] for part in parts] == [8, 4] and done.evaluations[-1]["eval_documents"] == 12
    assert "one.jsonl + two.jsonl" in write_model_card(done.run).read_text()
    assert yaml.safe_load((done.run / "recipe.yaml").read_text())["eval_dataset_mixture"][1]["weight"] == 1.0
    again = run_command([sys.executable, "eval/classify.py", "--run_dir", str(done.run), "--no_pictures"])
    assert again.returncode == 0, again.stderr
    (file,) = done.run.glob("eval/mixture*/predictions.jsonl")
    last = max(done.run.glob("eval/step-*/predictions.jsonl"))
    ids, expected = ([json.loads(line)["label"] for line in each.read_text().splitlines()] for each in (file, last))
    assert ids == expected and len(ids) == 12


def test_an_evaluation_mixture_is_a_thing_of_its_own(three):
    recipe = recipe_of({"a.jsonl": 1}, eval_dataset_mixture={"b.jsonl": 1, "c.jsonl": 0.5})
    assert recipe.values["eval_strategy"] == "epoch" and recipe.eval_dataset_name == "b.jsonl + c.jsonl"
    assert "eval_dataset_name" not in recipe.resolved()
    assert recipe.with_values(eval_dataset_name="b.jsonl").eval_dataset_mixture is None
    with pytest.raises(UserError, match="eval_dataset_mixture and eval_dataset_name contradict each other"):
        recipe_of({"a.jsonl": 1}, eval_dataset_mixture={"b.jsonl": 1}, eval_dataset_name="c.jsonl")
    with pytest.raises(UserError, match="eval_dataset_split has no effect"):
        recipe_of({"a.jsonl": 1}, eval_dataset_mixture={"b.jsonl": 1}, eval_dataset_split="dev")
    shutil.copy("b.jsonl", "moved.jsonl")
    moved = recipe_of({"a.jsonl": 1}, eval_dataset_mixture={"moved.jsonl": 1, "c.jsonl": 0.5})
    assert not RunIdentity.of(moved).differences(RunIdentity.of(recipe))
    other = recipe_of({"a.jsonl": 1}, eval_dataset_mixture={"a.jsonl": 1, "c.jsonl": 0.5})
    assert "eval_dataset_mixture" in RunIdentity.of(other).differences(RunIdentity.of(recipe))


def test_lists_of_classes_are_aligned_by_name_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, order in {"a": ["joy", "anger"], "b": ["anger", "joy"]}.items():
        kind = datasets.Features(
            {"text": datasets.Value("string"), "label": datasets.List(datasets.ClassLabel(names=order))}
        )
        datasets.Dataset.from_dict({"text": [name], "label": [[0]]}, features=kind).save_to_disk(name)
    recipe = recipe_of([{"dataset_name": "a"}, {"dataset_name": "b"}])
    mixture = open_mixture(recipe.dataset_mixture or [], 1)
    assert [row["label"] for row in mixture.rows()] == [["joy"], ["anger"]]


@pytest.mark.parametrize("form", ["{}", "{}.0", "'{}'"])
def test_numbers_of_classes_are_names_however_a_table_writes_them(tmp_path, form):
    for name, order in {"a": ["neg", "pos"], "b": ["pos", "neg"]}.items():
        (tmp_path / name).mkdir()
        quoted = form.replace("'", '"')
        (tmp_path / name / "train.csv").write_text(f"text,label\nx,{quoted.format(0)}\ny,{quoted.format(1)}\nz,POS\n")
        feature = {"name": "label", "dtype": {"class_label": {"names": dict(enumerate(order))}}}
        card = yaml.safe_dump({"dataset_info": {"features": [feature]}})
        (tmp_path / name / "README.md").write_text(f"---\n{card}---\n")
    mixture = open_mixture([{"dataset_name": str(tmp_path / name), "weight": 1.0} for name in "ab"], 1)
    assert [row["label"] for row in mixture.rows()] == ["neg", "pos", "pos", "pos", "neg", "pos"]


def test_a_source_named_twice_by_fraction_is_refused(three):
    with pytest.raises(UserError, match=r"has the rows of a.jsonl twice: add the fractions"):
        texts_of([{"path": "a.jsonl", "fraction": 0.5}, {"path": "a.jsonl", "fraction": 0.5}])


def test_a_row_is_named_by_its_source_whoever_has_read_how_much(three):
    recipe = recipe_of([{"dataset_name": "a.jsonl"}, {"dataset_name": "b.jsonl"}])
    fresh = open_mixture(recipe.dataset_mixture or [], 1)
    assert fresh.where(12) == "row 3 of b.jsonl"
    begun = open_mixture(recipe.dataset_mixture or [], 1)
    next(iter(begun.rows()))
    assert begun.where(25) == "row 16 of b.jsonl"
