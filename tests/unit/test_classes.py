"""Which class a cell holds, in every form that labels are written in, and how lists of names are aligned."""

import io
import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.unit.test_labelled import quietly, word_tokenizer

from isotune.config import ClassificationRecipe
from isotune.data.class_index import label_of
from isotune.data.classification.classes import resolve
from isotune.data.classification.split import prepare_labelled
from isotune.data.sources.source import read_rows
from isotune.io.errors import UserError
from isotune.run.identity import RunIdentity


def where(row: int) -> str:
    return f"row {row + 1}"


def found(*cells: object, known=None, own=()) -> tuple[list[int], tuple[str, ...] | None]:
    column = resolve([label_of(cell) for cell in cells], where=where, known=known, own=own)
    return column.labels.tolist(), column.names


FORMS = {
    "whole numbers": ((1, 0, 2), [1, 0, 2], None),
    "floats that are whole": ((1.0, 0.0, 1), [1, 0, 1], None),
    "digits in quotes": (("1", "0", "1"), [1, 0, 1], None),
    "digits of a column with gaps": (("1.0", "0.0"), [1, 0], None),
    "words, in the order of the alphabet": (("storm", "calm", "storm"), [1, 0, 1], ("calm", "storm")),
    "words that differ in case and spaces": (("Very  Good", "bad", "very good "), [1, 0, 1], ("bad", "Very Good")),
    "true and false": ((True, False), [1, 0], ("false", "true")),
    "true and false in words": (("True", "False"), [1, 0], ("False", "True")),
    "digits among words": (("1", "other", "1"), [0, 1, 0], ("1", "other")),
    "Turkish and German letters": (("STRASSE", "straße", "x"), [0, 0, 1], ("STRASSE", "x")),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_labels_becomes_classes_in_a_stated_order(form):
    cells, labels, names = FORMS[form]
    assert found(*cells) == (labels, names)


NAMED = {
    "by name, whatever the case": (("POS", "neg"), ("neg", "pos"), [1, 0]),
    "numbers, where one side has no names": ((1, 0), ("neg", "pos"), [1, 0]),
    "digits, the same": (("1", "0"), ("neg", "pos"), [1, 0]),
    "names that are numbers are names": ((1, 5, 3), ("5", "4", "3", "2", "1"), [4, 0, 2]),
    "numbers below zero by their names": ((-1, 0, 1), ("-1", "0", "1"), [0, 1, 2]),
    "true and false by number": ((True, False), ("no", "yes"), [1, 0]),
    "true and false as words by number": (("True", "FALSE"), ("ham", "spam"), [1, 0]),
    "true and false by words of the same meaning": ((True, False), ("Yes", "no"), [0, 1]),
    "true and false of another order": ((False, True), ("POSITIVE", "NEGATIVE"), [1, 0]),
    "true and false by numbers": ((True, False), ("1", "0"), [0, 1]),
    "numbers that the names have": ((1, 5, 3), ("1 star", "2 stars", "3 stars", "4 stars", "5 stars"), [0, 4, 2]),
    "digits that the names have": (("2", "1"), ("grade 1", "grade 2"), [1, 0]),
    "numbers from 0 beside names that have others": ((0, 1), ("gpt2", "gpt3"), [0, 1]),
    "numbers from 0 that the names have": ((0, 1), ("class 0", "class 1"), [0, 1]),
    "true and false by name": ((True, False), ("true", "false"), [0, 1]),
    "underscores for blanks": (("very good", "not_good"), ("not good", "Very_Good"), [1, 0]),
    "names that differ in an underscore alone": (("a_b", "a b"), ("a b", "a_b"), [1, 0]),
    "signs are part of a name": (("A-", "A"), ("A", "A-"), [1, 0]),
    "wide letters and odd blanks": (("ＧＯＯＤ", "very\u00a0bad"), ("very bad", "good"), [1, 0]),
    "names that differ in their case alone": (("a", "A"), ("A", "a"), [1, 0]),
}


@pytest.mark.parametrize(
    ("cells", "names", "says"),
    [
        (
            (1, 4, 2),
            ("1 star", "2 stars", "3 stars", "4 stars", "5 stars"),
            "row 1 is of class 1, which may be '1 star'",
        ),
        ((0, 1), ("LABEL_1", "LABEL_0"), "row 1 is of class 0, which may be 'LABEL_0' or, counted from 0, 'LABEL_1'"),
        ((True, False), ("a", "b", "c"), "row 1 is of class 'True'"),
    ],
)
def test_what_may_be_one_class_or_another_is_refused(cells, names, says):
    with pytest.raises(UserError, match=re.escape(says)):
        found(*cells, known=names)


@pytest.mark.parametrize("case", NAMED)
def test_labels_are_found_among_known_names(case):
    cells, names, labels = NAMED[case]
    assert found(*cells, known=names) == (labels, names)


def test_a_class_label_is_aligned_by_its_names_and_not_by_its_numbers():
    own = (("positive", "negative"),)
    cells = [label_of(cell, own[0]) for cell in (0, 1, 0)]
    aligned = resolve(cells, where=where, known=("NEGATIVE", "POSITIVE"), own=own)
    assert aligned.labels.tolist() == [1, 0, 1] and aligned.names == ("NEGATIVE", "POSITIVE")
    alone = resolve(cells, where=where, own=own)
    assert alone.labels.tolist() == [0, 1, 0] and alone.names == own[0]
    # a task renames the classes: the list that the model knows counts
    both = (("bad", "good"), ("neg", "pos"))
    assert resolve(["good", "bad"], where=where, known=("pos", "neg"), own=both).labels.tolist() == [0, 1]


WRONG = {
    "a word that is no name": (
        ("neg", "mixed"),
        ("neg", "pos"),
        "row 2 is of class 'mixed'.*mixed, neg.*neg, pos",
    ),
    "a number beyond the names": ((0, 2), ("neg", "pos"), "row 2 is of class '2'.*neg, pos"),
    "a number among names that are numbers": ((1, 0), ("1", "2"), "row 2 is of class '0'.* 1, 2"),
    "numbers and words": ((0, 1, "x"), None, "row 3 holds 'x' and row 1 0: .* not mixed"),
    "numbers and true": ((0, 1, True), None, "row 3 holds True"),
    "below zero": ((0, -1), None, "row 2 holds -1: a class is .*label_names"),
    "texts for classes": (tuple(f"text {n}" for n in range(8)), None, "hold 8 classes, 'text 0' first: .*no classes"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_label_that_is_no_class_is_refused_with_both_lists(case):
    cells, known, sentence = WRONG[case]
    with pytest.raises(UserError, match=sentence):
        found(*cells, known=known)


@pytest.mark.parametrize("cell", [None, float("nan"), 0.5, "", "  ", [1], 2**40])
def test_what_is_no_label_is_said(cell):
    with pytest.raises(ValueError, match=r"."):
        label_of(cell)


@pytest.fixture
def write(tmp_path):
    def written(name: str, *labels: object, **more: list) -> str:
        rows = [{"text": str(n + 1), "label": label} for n, label in enumerate(labels)]
        for key, values in more.items():
            rows = [{**row, key: value} for row, value in zip(rows, values, strict=True)]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    return written


def prepare(tmp_path, **keys):
    keys = {"model_name_or_path": "x", "output_dir": str(tmp_path / "run"), "max_seq_length": 8, **keys}
    return prepare_labelled(ClassificationRecipe.from_values(**keys), word_tokenizer(), show=False)


def test_evaluation_data_follow_the_names_of_the_training_data(tmp_path, write):
    train, other = write("a.jsonl", "pos", "neg", "mid", "pos"), write("b.jsonl", "POS", "neg", "Pos")
    data = prepare(tmp_path, dataset_name=train, eval_dataset_name=other)
    assert data.train.class_names == ["mid", "neg", "pos"] == data.found["label_names"]
    assert data.evaluation is not None and data.evaluation.documents.labels.tolist() == [2, 1, 2]
    assert data.evaluation.table.counts["classes"] == [0, 1, 2]
    with pytest.raises(UserError, match=r"row 1 of .*c.jsonl is of class 'good'.*good.*mid, neg, pos"):
        prepare(tmp_path, dataset_name=train, eval_dataset_name=write("c.jsonl", "good", "neg"))
    with pytest.raises(UserError, match=r"are the numbers 0 to 1, and .*b.jsonl has neg, POS: label_names says"):
        prepare(tmp_path, dataset_name=write("d.jsonl", 0, 1), eval_dataset_name=other)


TOPICS = ("World", "Sports", "Business", "Sci/Tech")


@pytest.mark.parametrize("cells", [(0, 1, 2, 3), ("0", "1", "2", "3")])
def test_numbers_are_no_places_in_an_order_that_nobody_stated(tmp_path, write, cells):
    train, other = write("words.jsonl", *TOPICS), write("numbers.jsonl", *cells)
    says = (
        r"classes of .*words.jsonl are words in .* \(Business, Sci/Tech, Sports, World\), and .*numbers.jsonl has numb"
    )
    for _ in range(2):  # read, and from the cache
        with pytest.raises(UserError, match=says):
            prepare(tmp_path, dataset_name=train, eval_dataset_name=other)
    data = prepare(tmp_path, dataset_name=train, eval_dataset_name=other, label_names=list(TOPICS))
    assert data.train.documents.labels.tolist() == data.evaluation.documents.labels.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("words", "cells", "classes"),
    [
        (("True", "False"), (1, 0), [1, 0]),
        (("yes", "no"), (True, False), [1, 0]),
        (("grade 2", "grade 1"), (1, 2), [0, 1]),
        (("ham", "spam"), (True, False), None),
        (("neg", "pos"), (0, 1), None),
        ((["ham"], ["spam", "ham"]), ([0, 1], [1, 0]), None),
        ((["ham"], ["spam", "ham"]), ([1], [0]), None),
    ],
)
def test_numbers_whose_names_say_which_class_they_are_stay_classes(tmp_path, write, words, cells, classes):
    keys = {"dataset_name": write("words.jsonl", *words), "eval_dataset_name": write("numbers.jsonl", *cells)}
    if classes is None:
        with pytest.raises(UserError, match=r"numbers.jsonl has numbers, or true and false: label_names says which is"):
            prepare(tmp_path, **keys)
    else:
        assert prepare(tmp_path, **keys).evaluation.documents.labels.tolist() == classes


def test_numbers_are_places_in_the_order_of_a_class_label(tmp_path, write):
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["storm", "calm"])})
    Dataset.from_dict({"text": ["1", "2"], "label": [0, 1]}, features=features).to_parquet(tmp_path / "rows.parquet")
    data = prepare(tmp_path, dataset_name=str(tmp_path / "rows.parquet"), eval_dataset_name=write("b.jsonl", 1, 0))
    assert data.evaluation.documents.labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("named.csv", "text,label\nx,1\ny,0\n"),
        ("plain.csv", "1,x\n0,y\n"),
        ("rows.jsonl", '{"text": "x", "label": 1}\n{"text": "y", "label": 0}\n'),
    ],
)
def test_columns_of_the_training_file_are_not_those_of_an_evaluation_file_that_has_names(tmp_path, name, content):
    (tmp_path / "train.csv").write_text("0,a\n1,b\n")
    (tmp_path / name).write_text(content)
    keys = {"model_name_or_path": "x", "dataset_name": str(tmp_path / "train.csv"), "output_dir": str(tmp_path / "run")}
    keys |= {"dataset_columns": ["label", "text"], "eval_dataset_name": str(tmp_path / name), "max_seq_length": 8}
    recipe = ClassificationRecipe.from_values(**keys)
    data = prepare_labelled(recipe, word_tokenizer(), show=False)
    assert data.evaluation.documents.labels.tolist() == [1, 0]
    assert list(data.evaluation.texts()) == ["x", "y"]
    assert RunIdentity.of(recipe).contents.keys() == {"dataset_name", "eval_dataset_name"}


def test_a_saved_data_sets_names_are_taken_over_and_those_of_its_parquet(tmp_path):
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["storm", "calm"])})
    dataset = Dataset.from_dict({"text": ["1", "2", "3"], "label": [0, 1, 1]}, features=features)
    dataset.save_to_disk(str(tmp_path / "saved"))
    dataset.to_parquet(str(tmp_path / "rows.parquet"))
    for name in ("saved", "rows.parquet"):
        prepared = quietly(str(tmp_path / name))
        assert prepared.class_names == ["storm", "calm"] and prepared.documents.labels.tolist() == [0, 1, 1]
    again = quietly(str(tmp_path / "saved"), label_names=("calm", "storm"))
    assert again.documents.labels.tolist() == [1, 0, 0]
    unlabelled = dataset.map(lambda row: {"label": -1}, features=features)
    unlabelled.save_to_disk(str(tmp_path / "test"))
    with pytest.raises(UserError, match=r"row 1 of .*holds -1, and its column has the classes 0 to 1: storm, calm"):
        quietly(str(tmp_path / "test"))


OF_ANOTHER_KIND = {
    "numbers": (("0", "1"), [0, 1]),
    "true and false": (("True", "False"), [1, 0]),
}


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
@pytest.mark.parametrize("kind", OF_ANOTHER_KIND)
def test_sources_of_a_mixture_whose_classes_are_of_other_kinds_are_refused(tmp_path, write, form, kind):
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos"])})
    first = tmp_path / f"first.{form}"
    if form == "jsonl":
        write(first.name, "pos", "neg")
    else:
        Dataset.from_dict({"text": ["1", "2"], "label": [1, 0]}, features=features).to_parquet(first)
    cells, classes = OF_ANOTHER_KIND[kind]
    (tmp_path / "more.csv").write_text(f"text,label\n3,{cells[0]}\n4,{cells[1]}\n")
    mixture = [{"dataset_name": str(tmp_path / name)} for name in (first.name, "more.csv")]
    with pytest.raises(
        UserError, match=rf"row 1 of .*more.csv holds '{cells[0]}' and row 1 of .*first.* 'pos': .*mixed"
    ):
        prepare(tmp_path, dataset_mixture=mixture)
    data = prepare(tmp_path, dataset_mixture=mixture, label_names=["neg", "pos"])
    assert data.train.documents.labels.tolist() == [1, 0, *classes]


def test_lists_of_labels_in_a_mixture_are_of_one_kind_too(tmp_path, write):
    mixture = [{"dataset_name": write(name, *own)} for name, own in
               {"a.jsonl": [["ham", "eggs"], ["ham"]], "b.jsonl": [["0"], ["1", "0"]]}.items()]  # fmt: skip
    with pytest.raises(UserError, match=r"row 1 of .*b.jsonl holds '0' and row 1 of .*a.jsonl 'ham': .* not mixed"):
        prepare(tmp_path, dataset_mixture=mixture)


def test_digits_that_are_names_in_one_source_of_a_mixture_are_names_in_the_other(tmp_path, write):
    mixture = [{"dataset_name": write(name, *own)} for name, own in
               {"a.jsonl": ["1", "other", "2"], "b.jsonl": ["1", "2"]}.items()]  # fmt: skip
    data = prepare(tmp_path, dataset_mixture=mixture)
    assert data.train.class_names == ["1", "2", "other"]
    assert data.train.documents.labels.tolist() == [0, 2, 1, 0, 1]


IDS = {
    "repeated": [7, 7, 8],
    "of two kinds": [0, "x", 1],
    "null": [None, None, None],
    "fractions": [0.5, 1.5, 2.5],
    "lists": [[1], [1], [2]],
}


@pytest.mark.parametrize("kind", IDS)
def test_an_id_column_that_nobody_asked_for_is_passed_over_with_a_line(write, kind):
    path = write("rows.jsonl", 0, 1, 0, id=IDS[kind])
    prepared = quietly(path)
    assert prepared.documents.ids.tolist() == [0, 1, 2]
    (note,) = prepared.table.counts["notes"]
    assert "'id'" in note and "dataset_id_field" in note and note in str(prepared.table)
    assert quietly(path, dataset_id_field="none").table.counts["notes"] == []
    with pytest.raises(UserError, match="row"):
        quietly(path, dataset_id_field="id")


@pytest.mark.parametrize("word", ["none", "null", "", None, "None"])
def test_no_ids_can_be_asked_for_and_stay_so_in_the_resolved_recipe(tmp_path, word):
    keys = {"model_name_or_path": "x", "dataset_name": "y", "output_dir": str(tmp_path)}
    recipe = ClassificationRecipe.from_values(**keys, dataset_id_field=word)
    assert recipe.dataset_id_field == "none" and recipe.resolved()["dataset_id_field"] == "none"
    assert ClassificationRecipe.from_values(**recipe.resolved()).dataset_id_field == "none"
    assert "dataset_id_field" not in ClassificationRecipe.from_values(**keys).resolved()


def test_what_the_data_decide_is_no_other_run_but_what_is_given_is(tmp_path):
    keys = {"model_name_or_path": "x", "dataset_name": "y", "output_dir": str(tmp_path)}
    plain = ClassificationRecipe.from_values(**keys)
    first, again = (RunIdentity.of(recipe) for recipe in (plain.with_values(label_names=["a", "b"]), plain))
    assert not first.differences(again) and not again.differences(first)
    assert first.differences(RunIdentity.of(plain.with_values(label_names=["b", "a"]))).keys() == {"label_names"}
    assert again.differences(RunIdentity.of(plain.with_values(seed=1))).keys() == {"seed"}


def test_rows_of_a_source_without_features_have_no_names(write):
    assert read_rows(write("rows.jsonl", 0, 1)).class_names == {}
    assert np.array_equal(quietly(write("two.jsonl", 0, 1)).documents.labels, [0, 1])


@pytest.mark.parametrize(
    ("labels", "names", "classes"),
    [
        ([1, 5, 2, 3, 4], ("1", "2", "3", "4", "5"), [0, 4, 1, 2, 3]),
        (["2.0", "1.0"], ("1", "2"), [1, 0]),
        ([-1, 1, 1], ("-1", "1"), [0, 1, 1]),
    ],
)
def test_classes_that_are_counted_from_elsewhere_are_called_by_their_numbers(labels, names, classes):
    found = resolve(labels, where=str)
    assert found.names == names and found.labels.tolist() == classes
    again = resolve(labels[::-1], where=str, known=names)  # an evaluation, aligned by name
    assert again.labels.tolist() == classes[::-1]


@pytest.mark.parametrize("labels", [[0, 2], [2, 4], [1, 1]])
def test_gaps_and_single_numbers_stay_numbers(labels):
    assert resolve(labels, where=str).names is None


def test_a_number_beyond_every_class_is_a_word_or_refused():
    assert resolve(["1", "2", "99999999999"], where=str).names == ("1", "2", "99999999999")
    with pytest.raises(UserError, match="holds -1"):
        resolve([-1, 0, 1], where=lambda row: f"row {row + 1}")


def test_evaluation_rows_without_the_first_class_keep_their_numbers():
    assert resolve([1, 2, 3], where=str, count=4).names is None
    assert resolve([1, 2, 3], where=str, count=3).names == ("1", "2", "3")


@pytest.mark.parametrize("word", ["NA", "nan", "None", "null", "N/A", "?"])
def test_what_programs_write_for_a_missing_number_is_no_class_of_its_own(word):
    with pytest.raises(UserError, match=f"row 3 .*holds '{re.escape(word)}', and other rows numbers"):
        found("0", "1", word, "2.0")
    assert found("calm", word, "storm")[1] is not None  # among words it may be one
    assert found("0", word, known=("0", word))[0] == [0, 1]


def test_two_forms_of_one_word_in_unicode_are_one_class():
    assert found("caf\u00e9", "cafe\u0301", "tea", "\ufefftea", "\uff34\uff25\uff21")[0] == [0, 0, 1, 1, 1]


def test_numbers_beside_the_same_numbers_in_quotes_are_one_kind():
    assert resolve(["0", 1, "1"], where=str).labels.tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("labels", "names", "classes"),
    [
        (["007", "042", "007"], ("007", "042"), [0, 1, 0]),
        (["02", "01", "10"], ("01", "02", "10"), [1, 0, 2]),
        (["001", "002", "003"], ("001", "002", "003"), [0, 1, 2]),
        (["00", "01"], ("00", "01"), [0, 1]),
    ],
)
def test_a_code_keeps_its_zeros(labels, names, classes):
    alone = resolve(labels, where=str)
    assert (alone.names, alone.labels.tolist(), alone.numbered) == (names, classes, False)
    assert resolve(labels, where=str, known=names[::-1]).labels.tolist() == [len(names) - 1 - own for own in classes]


def test_a_zero_in_front_is_another_spelling_of_a_number_that_stands_there_too():
    assert resolve(["0", "1", "01", "00"], where=str).labels.tolist() == [0, 1, 1, 0]
    assert resolve(["01", "02"], where=str, known=("2", "1")).labels.tolist() == [1, 0]
    with pytest.raises(UserError, match=r"row 1 is of class '1'.*01, 02"):  # a number does not say which code it is
        resolve([1, 2], where=where, known=("01", "02"))


@pytest.mark.parametrize("name", ["a.parquet", "a.pq", "a.PARQUET", "a.parquet.gz", "a.arrow", "a.arrow.zst"])
def test_names_of_classes_are_kept_whatever_compresses_the_table(tmp_path, name):
    features = {"label": {"names": ["storm", "calm"], "_type": "ClassLabel"}}
    told = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pa.table({"text": ["a", "b"], "label": [0, 1]}).replace_schema_metadata(told)
    file = io.BytesIO()
    if ".arrow" in name:
        with pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
    else:
        pq.write_table(table, file)
    kind = {"gz": "gzip", "zst": "zstd"}.get(name.rpartition(".")[2])
    content = pa.compress(file.getvalue(), codec=kind, asbytes=True) if kind else file.getvalue()
    (tmp_path / name).write_bytes(content)
    source = read_rows(str(tmp_path / name))
    assert source.class_names == {"label": (("storm", "calm"),)}
    assert [row["label"] for row in source.rows()] == [0, 1]
