"""A task file says what is evaluated on; a template, names of classes and flags do what they say, or are refused."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import BertConfig

from isotune.data.classification.labels import ClassificationSettings
from isotune.evaluation.classification.evaluate import Evaluation, read_task_rows, write_evaluation
from isotune.evaluation.classification.task_columns import with_columns
from isotune.evaluation.distributed_eval import Ranks
from isotune.evaluation.models import Classifier, task_of_run
from isotune.evaluation.statistics.resampling import Scores
from isotune.evaluation.tasks import ClassificationTask, read_task
from isotune.io.errors import UserError
from isotune.models.base.builtin import builtin_tokenizer

KINDS = ("command", "statement", "question")
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


def classifier_of(num_labels: int = 2, names=None, **settings) -> Classifier:
    """A classifier of a run on own.csv; nothing here computes with it."""
    run = SimpleNamespace(settings={"dataset_name": "own.csv", "eval_dataset_name": None})
    model = SimpleNamespace(config=BertConfig(num_labels=num_labels))
    own = ClassificationSettings(
        max_seq_length=64, task_type="single_label", num_labels=num_labels, label_names=names, **settings
    )
    return Classifier("run", model, builtin_tokenizer("builtin:bert-tiny"), own, names, run)  # type: ignore[arg-type]


def labels_read(task: ClassificationTask, classifier: Classifier) -> tuple[list[str], list[str]]:
    """The texts, and the names of their classes, as an evaluation reads them."""
    task, notes = with_columns(task, classifier)
    rows = read_task_rows(task, classifier, Ranks(0, 1, torch.device("cpu")), notes=notes)
    assert set(notes) <= set(rows.notes)
    return rows.texts, [rows.names[label] for label in rows.labels]


def test_a_run_by_rules_is_scored_by_the_column_of_other_data(tmp_path, capsys):
    file = tmp_path / "hand.csv"
    file.write_text("text,kind\nGo home now.,question\nIs it late?,command\n")  # neither is what the rules say
    by_rules = classifier_of(3, KINDS, label_source="rules")
    task = ClassificationTask(dataset_name=str(file), dataset_label_field="kind")
    assert labels_read(task, by_rules)[1] == ["question", "command"]
    assert "run was trained on those of label_source: rules" in capsys.readouterr().out
    again = ClassificationTask(dataset_name=str(file), label_source="rules")
    assert labels_read(again, by_rules)[1] == ["command", "question"]
    with pytest.raises(
        UserError, match=r"has no column 'label' of classes.*name the column by dataset_label_field, or"
    ):
        with_columns(ClassificationTask(dataset_name=str(file)), by_rules)


@pytest.mark.parametrize(("cells", "are_places"), [(("0", "2"), True), (("command", "statement"), False)])
def test_numbers_that_are_taken_for_places_of_named_classes_are_noted(tmp_path, cells, are_places):
    file = tmp_path / "t.csv"
    file.write_text("text,label\n" + "".join(f"some text {cell},{cell}\n" for cell in cells))
    task, ranks = ClassificationTask(dataset_name=str(file)), Ranks(0, 1, torch.device("cpu"))
    rows = read_task_rows(task, classifier_of(3, sorted(KINDS)), ranks)
    assert any("numbers are taken for the places of" in note for note in rows.notes) == are_places


def test_the_first_rows_of_a_share_are_refused_where_rules_give_the_classes(tmp_path):
    """Which texts a run held out depends on all of them there: the first rows alone would name others."""
    file = tmp_path / "own.csv"
    file.write_text("text\n" + "".join(f"Is it {n}?\nGo to {n}.\nIt was {n}.\n" for n in range(40)))
    task = ClassificationTask(dataset_name=str(file), label_source="rules")
    by_rules, ranks = classifier_of(3, KINDS, label_source="rules"), Ranks(0, 1, torch.device("cpu"))
    assert len(read_task_rows(task, by_rules, ranks, held_out=(0.2, 1)).texts) < 60
    with pytest.raises(UserError, match="--limit has no sure meaning here"):
        read_task_rows(task, by_rules, ranks, 30, held_out=(0.2, 1))
    assert len(read_task_rows(task, by_rules, ranks, 30).texts) == 30


@pytest.mark.parametrize(
    ("named", "source"),
    [({}, "rules"), ({"dataset_label_field": "kind"}, "column"), ({"labels": KINDS}, "column")],
)
def test_rules_stay_for_the_runs_own_data_unless_classes_are_named(tmp_path, monkeypatch, named, source):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.csv").write_text("text,label,kind\nGo.,question,statement\n")
    task, _ = with_columns(ClassificationTask(dataset_name="own.csv", **named), classifier_of(3, label_source="rules"))
    assert (task.label_source or "rules") == source
    assert "label_source" not in task.decisive() or source == "column"  # earlier results stay what they are


@pytest.mark.parametrize(
    ("columns", "texts", "said"),
    [
        (
            "text,review,label,stars",
            ["b"],
            "the texts from the column 'review' and the classes from the column 'stars'",
        ),
        ("text,other,label,stars", ["a"], "the texts from the column 'text' and the classes from the column 'stars'"),
        ("text,other,label,x", ["a"], "the texts from the column 'text' and the classes from the column 'label'"),
    ],
)
def test_a_runs_columns_are_read_where_other_data_have_them(tmp_path, columns, texts, said):
    (tmp_path / "t.csv").write_text(f"{columns}\na,b,0,1\n")
    classifier = classifier_of(dataset_text_field="review", dataset_label_field="stars")
    task = ClassificationTask(dataset_name=str(tmp_path / "t.csv"))
    assert labels_read(task, classifier) == (texts, ["0" if "'label'" in said else "1"])
    assert said in with_columns(task, classifier)[1][0]
    named = ClassificationTask(dataset_name=task.dataset_name, dataset_text_field="label", dataset_label_field="label")
    assert with_columns(named, classifier) == (named, [])


def test_what_reading_guessed_is_in_the_result_of_a_classifier(tmp_path):
    (tmp_path / "t.csv").write_text("review;label\na;0\n\nb;1\n")
    classifier = classifier_of(dataset_text_field="review")
    task, notes = with_columns(ClassificationTask(dataset_name=str(tmp_path / "t.csv")), classifier)
    rows = read_task_rows(task, classifier, Ranks(0, 1, torch.device("cpu")), notes=notes)
    assert rows.notes == (*notes, "t.csv: cells end at ';'", "t.csv: 1 empty lines")
    evaluation = Evaluation(rows, np.full((2, 2), 0.5), Scores({}, {}))
    write_evaluation(evaluation, tmp_path / "out", classifier, task, {})
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["notes"] == list(rows.notes)


@pytest.mark.parametrize("name", ["rows.jsonl", "named.csv", "plain.csv"])
def test_columns_of_a_runs_training_file_are_not_those_of_other_data_that_have_names(tmp_path, name):
    rows = [{"label": "1", "text": "a"}, {"label": "0", "text": "b"}]
    content = {"named.csv": "text,label\na,1\nb,0\n", "plain.csv": "1,a\n0,b\n"}
    (tmp_path / name).write_text(content.get(name) or "".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "eval_dataset_name": str(tmp_path / name),
        "dataset_columns": ["label", "text"],
        "eval_dataset_split": "x",
    }
    recipe |= {"dataset_text_field": "text", "dataset_label_field": "label"}
    task, held_out = task_of_run(SimpleNamespace(run=SimpleNamespace(settings=recipe), name="it"), {})
    assert held_out is None and list(task.rows().rows()) == rows
    json.dumps(task.decisive())  # which a result's folder is named by
