"""Columns that a recipe does not name are found where only one can be meant, said and recorded; else it is asked."""

import pytest
from tests.unit.test_labelled import word_tokenizer

from isotune.config import ClassificationRecipe
from isotune.data.classification.split import prepare_labelled
from isotune.io.errors import UserError

TEXTS = ("a fine day out", "no good at all", "well worth it", "a sad end")
REVIEWS = [(text, ("pos", "neg")[n % 2], 7 + n) for n, text in enumerate(TEXTS)]


@pytest.fixture
def prepare(tmp_path):
    def prepared(header: str, rows, **keys):
        path = tmp_path / "reviews.csv"
        path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n")
        keys = {"model_name_or_path": "x", "output_dir": str(tmp_path / "run"), "max_seq_length": 8, **keys}
        recipe = ClassificationRecipe.from_values(dataset_name=str(path), **keys)
        return prepare_labelled(recipe, word_tokenizer(), show=False)

    return prepared


def test_the_only_columns_that_fit_are_used_said_and_recorded(prepare):
    data = prepare("review,sentiment,number", REVIEWS)
    assert data.found == {
        "dataset_text_field": "review", "dataset_label_field": "sentiment", "label_names": ["neg", "pos"],
    }  # fmt: skip
    assert data.train.documents.labels.tolist() == [1, 0, 1, 0] and list(data.train.texts())[3] == "a sad end"
    assert "the texts from the column 'review' and the classes from the column 'sentiment'" in str(data.train.table)


@pytest.mark.parametrize("label_first", [True, False])
def test_a_file_whose_first_line_is_a_row_does_not_lose_it(prepare, label_first):
    rows = [(label, text) if label_first else (text, label) for text, label, _ in REVIEWS]
    header, names = ("neg,not my kind", "label text") if label_first else ("not my kind,neg", "text label")
    with pytest.raises(UserError, match=f"line 1 does not name the columns but holds a row .* {names}"):
        prepare(header, rows)
    assert prepare("neg,remark" if label_first else "remark,neg", rows).found["dataset_label_field"] == "neg"


@pytest.mark.parametrize("first", ["Loved it", "Great!", "so so"])
def test_a_short_first_row_before_long_ones_is_not_lost_either(prepare, first):
    rows = [(f"{text} and so it went on and on for many words more", label) for text, label, _ in REVIEWS]
    with pytest.raises(UserError, match=r"line 1 does not name the columns but holds a row .* text label"):
        prepare(f"{first},pos", rows)


def test_the_order_of_the_columns_means_nothing_and_whole_numbers_are_classes(prepare):
    data = prepare("stars,id,review", [(n % 2, 100 + n, f"text number {n}") for n in range(8)])
    assert data.found == {"dataset_text_field": "review", "dataset_label_field": "stars"}
    assert data.train.documents.ids.tolist() == [str(n) for n in range(100, 108)]


def test_the_usual_names_are_no_guess_and_what_is_given_is_not_looked_for(prepare):
    assert prepare("text,label,number", REVIEWS).found == {"label_names": ["neg", "pos"]}
    given = prepare("review,sentiment,number", REVIEWS, dataset_text_field="review", label_names=["pos", "neg"])
    assert given.found == {"dataset_label_field": "sentiment"} and given.train.class_names == ["pos", "neg"]
    with pytest.raises(UserError, match="lacks the column 'mood'"):
        prepare("review,sentiment,number", REVIEWS, dataset_label_field="mood")


@pytest.mark.parametrize(
    ("header", "rows", "sentence"),
    [
        ("title,body,label", [(f"title number {n}", f"body text {n}", n % 2) for n in range(6)],
         "no column 'text', and 'title' and 'body' could hold its texts: say which by --dataset_text_field"),
        ("text,mood,stars", [(f"text number {n}", n % 2, n % 3) for n in range(6)],
         "no column 'label', and 'mood' and 'stars' could hold its classes: say which by --dataset_label_field"),
        ("text,number", [(f"text number {n}", n) for n in range(6)], "lacks the column 'label'; it has text, number"),
        ("code,label", [(f"x{n}", n % 2) for n in range(6)], "lacks the column 'text'; it has code, label"),
    ],
)  # fmt: skip
def test_where_two_columns_would_do_or_none_the_flag_is_asked_for(prepare, header, rows, sentence):
    with pytest.raises(UserError, match=sentence):
        prepare(header, rows)


def test_swapped_columns_are_refused(prepare):
    swapped = {"dataset_text_field": "label", "dataset_label_field": "text"}
    with pytest.raises(UserError, match=r"hold 6 classes, 'text number 0' first: these are texts and no classes"):
        prepare("text,label", [(f"text number {n}", n % 2) for n in range(6)], **swapped)
