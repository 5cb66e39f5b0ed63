"""Numbers and sets of labels: what cells are taken for where nobody says it, and what is said to wrong ones."""

import json
import math

import numpy as np
import pytest
from tests.unit.test_labelled import word_tokenizer

from isotune.config import ClassificationRecipe
from isotune.config.task_types import SINGLE_LABEL
from isotune.data.classification.split import prepare_labelled
from isotune.data.classification.targets import labels_of_rows, type_of
from isotune.io.errors import UserError


@pytest.fixture
def prepare(tmp_path):
    def prepared(labels, evaluation=None, *, columns=None, **keys):
        for name, cells in (("rows", labels), ("test", evaluation or [])):
            rows = [
                {"text": f"text number {n}", **(cell if columns else {"label": cell})} for n, cell in enumerate(cells)
            ]
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        keys = {"model_name_or_path": "x", "output_dir": str(tmp_path / "run"), "max_seq_length": 8, **keys}
        if evaluation is not None:
            keys["eval_dataset_name"] = str(tmp_path / "test.jsonl")
        recipe = ClassificationRecipe.from_values(dataset_name=str(tmp_path / "rows.jsonl"), **keys)
        return prepare_labelled(recipe, word_tokenizer(), show=False)

    return prepared


def targets(data) -> list:
    return np.asarray(data.train.documents.labels).tolist()


@pytest.mark.parametrize(
    ("cells", "task_type"),
    [
        ([0, 1, 2], "single_label"), ([1.0, 0.0], "single_label"), (["a", "b"], "single_label"),
        ([0.5, 1.25, 3], "regression"), (["0.5", "3", "2.75"], "regression"), ([0.5, 1, 2], "single_label"),
        ([*range(20), 0.5, 1.5], "single_label"), ([True, False], "single_label"), ([None, 0.5, 1.5], "single_label"),
        ([["a"], []], "multi_label"), (['["a", "b"]', "[]"], "multi_label"), (["['a']", "['b']"], "multi_label"),
        (["[a]", "[b]"], "single_label"), (["a|b", "b"], "single_label"),
    ],
)  # fmt: skip
def test_the_kind_of_labels_is_seen_by_the_cells(cells, task_type):
    assert type_of(cells) == task_type


def test_numbers_are_learnt_as_they_stand_said_and_recorded(prepare):
    data = prepare([0.5, 1.25, 3, "4.75"], [0.25, 0.5])
    assert targets(data) == [0.5, 1.25, 3.0, 4.75] and data.found == {"task_type": "regression"}
    assert data.train.num_labels == 1 and data.train.class_names is None and data.evaluation.task_type == "regression"
    table = str(data.train.table)
    assert "so task_type is regression" in table and "0.5 to 4.75, mean 2.375, deviation 1.644" in table
    assert "of class" not in table


def test_whole_numbers_are_a_regression_where_the_recipe_says_so(prepare):
    data = prepare([1, 2, "3", 2.0], task_type="regression")
    assert targets(data) == [1.0, 2.0, 3.0, 2.0] and data.found == {}


LISTS = {
    "names": ([["b", "a"], ["C"], [], ["a", "c"]], {}, ["a", "b", "C"], [[1, 1, 0], [0, 0, 1], [0, 0, 0], [1, 0, 1]]),
    "names in an order": ([["b"], ["a", "b"]], {"label_names": ["b", "a"]}, ["b", "a"], [[1, 0], [1, 1]]),
    "written lists": (['["b"]', "['a', 'b']"], {}, ["a", "b"], [[0, 1], [1, 1]]),
    "numbers": ([[2], [0, 1], []], {}, None, [[0, 0, 1], [1, 1, 0], [0, 0, 0]]),
    "numbers of names": ([[1], [0, 1]], {"label_names": ["x", "y", "z"]}, ["x", "y", "z"], [[0, 1, 0], [1, 1, 0]]),
    "0 and 1 a label": ([[0, 1, 0], [1, 1, 0]], {}, None, [[0, 1, 0], [1, 1, 0]]),
    "0 and 1 of two labels": ([[0, 1], [1, 0]], {}, None, [[0, 1], [1, 0]]),
    "0.0 and 1.0": ([[0.0, 1.0], [1.0, 0.0]], {"label_names": ["x", "y"]}, ["x", "y"], [[0, 1], [1, 0]]),
    "one separator": (["a|b", "c"], {"task_type": "multi_label"}, ["a", "b", "c"], [[1, 1, 0], [0, 0, 1]]),
    "a separator beside known names": (
        ["x, y|z", "x"], {"task_type": "multi_label", "label_names": ["x, y", "x", "z"]}, ["x, y", "x", "z"],
        [[1, 0, 1], [0, 1, 0]],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LISTS)
def test_lists_are_sets_of_labels_however_they_are_written(prepare, case):
    cells, keys, names, expected = LISTS[case]
    data = prepare(cells, **keys)
    assert targets(data) == expected and data.train.class_names == names and data.train.num_labels == len(expected[0])
    assert data.train.table.counts["classes"] == np.sum(expected, axis=0).tolist()
    empty = sum(not any(row) for row in expected)
    assert ("without a label" in str(data.train.table)) == bool(empty)


def test_columns_of_0_and_1_are_labels_by_their_names(prepare):
    rows = [{"toxic": 1, "rude": 0, "threat": 0}, {"toxic": "0", "rude": True, "threat": 0.0}] * 3
    found = prepare(rows, columns=True)
    assert found.found == {"task_type": "multi_label", "label_names": ["toxic", "rude", "threat"]}
    assert targets(found) == [[1, 0, 0], [0, 1, 0]] * 3
    assert "the labels from the columns of 0 and 1 toxic, rude, threat" in str(found.train.table)
    said = prepare(rows, rows[:1], columns=True, task_type="multi_label", label_names=["rude", "toxic"])
    assert targets(said)[0] == [0, 1] and said.evaluation.documents.labels.tolist() == [[0, 1]]


def test_evaluation_labels_are_aligned_by_name_and_may_lack_some(prepare):
    data = prepare([["b"], ["a", "c"]], [["C"], ["a"]])
    assert data.evaluation.documents.labels.tolist() == [[0, 0, 1], [1, 0, 0]]
    with pytest.raises(UserError, match=r"row 2 of .* is of class 'd': .* a, b, c"):
        prepare([["b"], ["a", "c"]], [["c"], ["d"]])
    with pytest.raises(UserError, match=r"row 1 of .*has the label 5, and there are 3: 0 to 2"):
        prepare([[0], [1, 2]], [[5, 0]])


REGRESSION, SEVERAL = {"task_type": "regression"}, {"task_type": "multi_label"}
MISTAKES = {
    "a word in a regression": ([0.5, "good", 1.5], REGRESSION, r"row 2 of .*, column 'label', holds 'good': .*finite"),
    "null in a regression": ([0.5, 1.5, None], REGRESSION, r"row 3 of .*holds null: .*finite number"),
    "NaN in a regression": ([0.5, math.nan], REGRESSION, r"row 2 of .*holds null: .*finite number"),
    "infinity in a regression": ([0.5, math.inf], REGRESSION, r"row 2 of .*holds inf: .*finite number"),
    "true in a regression": ([0.5, True], REGRESSION, r"row 2 of .*holds True: .*finite number"),
    "a list in a regression": ([0.5, [1]], REGRESSION, r"row 2 of .*holds \[1\]: .*finite number"),
    "one number for all": ([2.5, 2.5], REGRESSION, r"every row of .* has the number 2.5: there is nothing to learn"),
    "a fraction among classes": ([0, 1, 0.5], {}, r"row 3 of .*holds 0.5: a class .*task_type: regression is for numb"),
    "numbers beside known classes": ([0.5, 1.5], {"num_labels": 2}, r"row 1 of .*holds 0.5: a class is a whole number"),
    "a list among classes": ([0, [1]], {"task_type": "single_label"}, r"row 2 .*task_type: multi_label is for lists"),
    "no label anywhere": ([[], []], {}, r"no row of the column 'label' has a label: there is nothing to learn"),
    "the same labels for all": ([["a", "b"], ["b", "a"]], {}, r"every row of .* has the labels a, b: there is nothing"),
    "one label": ([["a"], []], {}, r"has one label, 'a': task_type multi_label needs two or more"),
    "a null among lists": ([["a"], None], {}, r"row 2 of .*holds null, and other rows a list: \[\] is of no label"),
    "a null label": ([["a"], ["b", None]], {}, r"row 2 of .*has the label null: it is a word or a whole number"),
    "an empty label": ([["a"], ["b", " "]], {}, r"row 2 of .*has the label an empty text"),
    "an unequal number": ([[0, 1, 0], [1, 0]], {}, r"row 2 of .*has 2 numbers of 0 and 1, and row 1 of .* has 3"),
    "more places than names": (
        [[0, 1, 0], [1, 0, 0]], {"label_names": ["a", "b"]}, r"row 1 of .*has 3 numbers of 0 and 1, and there are 2"),
    "a label below 0": ([[0], [-1]], {}, r"row 2 of .*holds -1: a class is a whole number from 0"),
    "two separators": (["a|b", "c,d"], SEVERAL, r"row 1 of .*holds 'a\|b': '\|' and ',' could separate labels"),
    "an empty text of labels": (["a|b", ""], SEVERAL, r"row 2 of .*holds an empty text: .*\[\] is of no label"),
    "a number of labels": ([3, 4], SEVERAL, r"row 1 of .*holds 3: task_type multi_label needs a list of labels"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_labels_is_one_sentence_that_names_the_row(prepare, mistake):
    cells, keys, sentence = MISTAKES[mistake]
    with pytest.raises(UserError, match=sentence):
        prepare(cells, **keys)


def test_a_cell_of_a_labels_column_that_is_neither_0_nor_1_is_named(prepare):
    rows = [{"a": 0, "b": 1}, {"a": 1, "b": 2}]
    with pytest.raises(UserError, match=r"row 2 of .*, column 'b', holds 2: a label's cell is 0 or 1"):
        prepare(rows, columns=True, task_type="multi_label", label_names=["a", "b"])
    with pytest.raises(UserError, match=r"row 1 of .* lacks the column 'c'.*label_names"):
        prepare(rows, columns=True, task_type="multi_label", label_names=["a", "b", "c"])
    two = [{"a": 0, "b": 1}, {"a": 1, "b": 0}] * 2
    with pytest.raises(UserError, match="'a' and 'b' could hold its classes: say which by --dataset_label_field"):
        prepare(two, columns=True)


WRONG_KEYS = {
    "class_weights": ("balanced", "class_weights are of classes and labels"),
    "label_thresholds": ([0.3], "label_thresholds are of multi_label"),
    "label_smoothing_factor": (0.1, "label_smoothing_factor is of single_label"),
    "label_names": (["a", "b"], "leave out label_names"),
    "num_labels": (2, "leave out num_labels"),
}


@pytest.mark.parametrize("name", WRONG_KEYS)
def test_keys_of_classes_are_refused_for_a_regression_before_the_data_is_read(name):
    value, sentence = WRONG_KEYS[name]
    keys = {"model_name_or_path": "x", "dataset_name": "x", "output_dir": "x", "task_type": "regression", name: value}
    with pytest.raises(UserError, match=sentence):
        ClassificationRecipe.from_values(**keys)


def test_keys_that_the_kind_of_labels_rules_out_are_refused_where_the_data_shows_it(prepare):
    best = {"metric_for_best_model": "eval_accuracy", "load_best_model_at_end": True}
    with pytest.raises(
        UserError, match=r"labelled for task_type regression: metric_for_best_model is eval_accuracy, and"
    ):
        prepare([0.5, 1.5], [0.5, 1.5], **best)
    with pytest.raises(UserError, match="task_type multi_label: label_smoothing_factor is of single_label"):
        prepare([["a"], ["b"]], label_smoothing_factor=0.1)
    with pytest.raises(UserError, match="task_type single_label: label_thresholds are of multi_label"):
        prepare([0, 1], label_thresholds=[0.3])
    with pytest.raises(UserError, match="metric_for_best_model is eval_pearson, and single_label has eval_loss"):
        prepare([0, 1], [0, 1], metric_for_best_model="eval_pearson", load_best_model_at_end=True)


def test_a_recipe_that_says_single_label_is_the_same_experiment_as_one_that_leaves_it_open():
    keys = {"model_name_or_path": "x", "dataset_name": "x", "output_dir": "x"}
    plain, said, other = (
        ClassificationRecipe.from_values(**keys, **more)
        for more in ({}, {"task_type": "single_label"}, {"task_type": "multi_label"})
    )
    assert plain.fingerprint() == said.fingerprint() != other.fingerprint() and "task_type" not in plain.resolved()


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        ([[5, 2_000_000_000]], "labels are numbered from 0 and fewer than 1,000"),
        ([[0.0], [1.0]], "lists of one number"),
    ],
)
def test_sets_of_labels_that_no_model_has_are_refused(cells, said):
    with pytest.raises(UserError, match=said):
        labels_of_rows(cells, lambda row: f"row {row + 1}", "tags")


@pytest.mark.parametrize("cells", [[10**400], ["[{[1]: 2}]"], ["[" * 100_000 + "]"]])
def test_cells_that_break_a_parser_are_no_labels_and_no_traceback(cells):
    assert type_of(cells) == SINGLE_LABEL
