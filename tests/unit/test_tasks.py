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
