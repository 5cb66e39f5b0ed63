"""A task file says what is evaluated on; a template, names of classes and flags do what they say, or are refused."""

import json

import pytest

from isotune.evaluation.tasks import ClassificationTask, read_task
from isotune.io.errors import UserError

ROWS = [{"title": "One", "body": "first {curly}", "label": "good"}, {"title": "Two", "body": "second", "label": 0}]


@pytest.fixture
def rows(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(file)


def test_every_shipped_task_is_whole(repository):
    files = sorted((repository / "eval" / "configs").glob("*.yaml"))
    files = [file for file in files if "\nlabels:" in file.read_text()]  # the others ask a model for texts
    names = [read_task(ClassificationTask, file, {}).name for file in files]
    assert names == ["imdb-test", "opinions-test", "yelp_review_full-test"]


def test_a_template_and_names_of_classes_make_the_rows(rows):
    task = ClassificationTask(dataset_name=rows, template="{title}: {body}", labels=("bad", "good"))
    made = list(task.source().rows())
    assert [(row["text"], row["label"]) for row in made] == [("One: first {curly}", "good"), ("Two: second", "bad")]
    assert list(task.source(limit=1).rows()) == made[:1]


def test_what_decides_the_rows_decides_the_fingerprint(rows):
    tasks = [ClassificationTask(dataset_name=rows, template=template) for template in ("{title}", "{body}", "{title} ")]
    prints = {task.source(limit).fingerprint for task in tasks for limit in (None, 1, 2)}
    assert len(prints) == 9


def test_flags_win_over_the_file(tmp_path, rows):
    file = tmp_path / "task.yaml"
    file.write_text("dataset_name: elsewhere\ndataset_split: train\nordinal: true\n")
    task = read_task(ClassificationTask, file, {"dataset_name": rows, "ordinal": None, "max_seq_length": 99})
    assert (task.dataset_name, task.dataset_split, task.ordinal, task.max_seq_length) == (rows, "train", True, 99)


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("dataset_nam: a", "there is no key 'dataset_nam': did you mean 'dataset_name'"),
        ("ordinal: true", "there is nothing to evaluate on"),
        ("dataset_name: a\nordinal: yes please", "ordinal is 'yes please': it is true or false"),
        ("dataset_name: a\nlabels: [a, a]", "labels is .* a list without doubles"),
        ("dataset_name: a\nmetrics: accuracy", "metrics is 'accuracy': it is a list"),
        ("dataset_name: a\ntemplate: no column", "template 'no column': it holds the row's columns"),
        ("dataset_name: a\ntemplate: '{text.__class__}'", "it holds the row's columns"),
        ("dataset_name: a\ntemplate: '{text'", "cannot be read"),
        ("- a list", "holds no keys"),
        ("a: b: c", "cannot be read"),
    ],
)
def test_a_task_file_that_says_nothing_sensible_is_refused(tmp_path, written, said):
    file = tmp_path / "task.yaml"
    file.write_text(written)
    with pytest.raises(UserError, match=said):
        read_task(ClassificationTask, file, {})


@pytest.mark.parametrize(
    ("task", "said"),
    [
        (
            {"template": "{nothing}"},
            r"row 1 of .*lacks the column 'nothing'; it has title, body, label: name it by the template",
        ),
        ({"labels": ("fine", "poor")}, "row 1 of .* is of class 'good', and the task knows fine, poor"),
        ({"labels": ("good",), "template": "{title}"}, None),
        ({"labels": (5, 7)}, "is of class 'good', and the task knows 5, 7"),
    ],
)
def test_a_row_that_the_task_does_not_fit_is_named(rows, task, said):
    source = ClassificationTask(dataset_name=rows, **task).source()
    if said is None:
        assert [row["label"] for row in source.rows()] == ["good", "good"]
        return
    with pytest.raises(UserError, match=said):
        list(source.rows())


@pytest.mark.parametrize(
    ("written", "names"),
    [
        ("[no, yes]", ("no", "yes")),
        ("[true, false]", ("true", "false")),
        ("[010, 011]", ("010", "011")),
        ("[1.10, 1.20]", ("1.10", "1.20")),
        ("[1_000, 12:30, 0x1F, 1e5]", ("1_000", "12:30", "0x1F", "1e5")),
        ("[2020-01-01, 'null']", ("2020-01-01", "null")),
        ("[1, 2]", (1, 2)),
    ],
)
def test_words_of_a_task_file_stay_what_stands_there(tmp_path, written, names):
    file = tmp_path / "task.yaml"
    file.write_text(f"dataset_name: 2024\ndataset_label_field: on\ndataset_columns: [01, on, 2]\nlabels: {written}\n")
    task = read_task(ClassificationTask, file, {})
    assert (task.dataset_name, task.dataset_label_field, task.labels) == ("2024", "on", names)
    assert task.dataset_columns == ("01", "on", "2")
    data = tmp_path / "rows.csv"
    data.write_text("".join(f"a,{name},b\n" for name in names))
    rows = list(read_task(ClassificationTask, file, {"dataset_name": str(data)}).source().rows())
    assert [row["on"] for row in rows] == list(map(str, names))


def test_types_of_other_keys_are_yamls(tmp_path):
    file = tmp_path / "task.yaml"
    file.write_text("dataset_name: a\nordinal: yes\nmax_seq_length: 12\nlabel_thresholds: [0.25]\ntemplate: '{no}'\n")
    task = read_task(ClassificationTask, file, {})
    assert (task.ordinal, task.max_seq_length, task.label_thresholds, task.template) == (True, 12, (0.25,), "{no}")


@pytest.mark.parametrize("word", ["none", "null", "~", ""])
def test_a_task_file_asks_for_no_ids_as_a_recipe_does(tmp_path, word):
    file = tmp_path / "task.yaml"
    file.write_text(f"dataset_name: a\ndataset_id_field: {word}\n")
    assert read_task(ClassificationTask, file, {}).dataset_id_field == "none"


def test_a_missing_number_is_no_text_of_a_template(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"size": 1.5, "label": 0}\n{"size": NaN, "label": 1}\n')
    with pytest.raises(UserError, match=r"row 2 of .*column 'size', is null: the template has no text for it"):
        list(ClassificationTask(dataset_name=str(file), template="{size}").source().rows())
