"""What a recipe may say of a classifier's training loss, from a file, from flags and from Python alike."""

import numpy as np
import pytest
from sklearn.utils.class_weight import compute_class_weight

from isotune.config import ClassificationRecipe, Recipe, read_recipe
from isotune.io.errors import UserError
from isotune.models.class_loss import ClassLoss, choose_weights

FILE = "model_name_or_path: m\ndataset_name: d\noutput_dir: o\n"


def read(tmp_path, more: str = "", *flags: str) -> ClassificationRecipe:
    file = tmp_path / "recipe.yaml"
    file.write_text(FILE + more)
    kind = ClassificationRecipe
    return read_recipe(["--config", str(file), *flags], default_config=None, prog="p", description="d", kind=kind)


@pytest.mark.parametrize(
    ("more", "flags", "expected"),
    [
        ("", [], None),
        ("class_weights: none", [], None),
        ("class_weights: balanced", [], "balanced"),
        ("class_weights: [1, 2.5, 1e-1]", [], [1.0, 2.5, 0.1]),
        ("class_weights: balanced", ["--class_weights", "1", "2.5"], [1.0, 2.5]),
        ("class_weights: [1, 2]", ["--class_weights", "balanced"], "balanced"),
        ("", ["--class_weights", "1,2.5"], [1.0, 2.5]),
        ("class_weights: [1, 2]", ["--class_weights", "none"], None),
    ],
)
def test_class_weights_are_none_balanced_or_numbers(tmp_path, more, flags, expected):
    recipe = read(tmp_path, more, *flags)
    assert recipe.class_weights == expected
    recipe.write(tmp_path / "again.yaml")
    again = read_recipe(
        ["--config", str(tmp_path / "again.yaml")],
        default_config=None, prog="p", description="d", kind=ClassificationRecipe,
    )  # fmt: skip
    assert again.class_weights == expected and again.fingerprint() == recipe.fingerprint()


@pytest.mark.parametrize(
    ("more", "flags", "named"),
    [
        ("label_names: no yes", [], "label_names (no yes)"),
        ("label_names: [no]", [], "label_names (no)"),
        ("", ["--label_names", "no yes"], "--label_names (no yes)"),
        ("", ["--label_names", "no"], "--label_names (no)"),
    ],
)
def test_one_name_of_a_class_is_answered_with_how_to_say_several(tmp_path, more, flags, named):
    with pytest.raises(UserError) as mistake:
        read(tmp_path, more, *flags)
    assert str(mistake.value).endswith(
        f"{named} cannot be: classes are two or more: say them as a list: [neg, pos], or as flags --label_names neg pos"
    )
    assert read(tmp_path, "label_names: [neg, pos]").label_names == ("neg", "pos")
    assert read(tmp_path, "", "--label_names", "neg", "pos").label_names == ("neg", "pos")


def test_a_list_is_shown_without_pythons_quotes(tmp_path):
    with pytest.raises(UserError, match=r"label_names \(neg, Neg\) cannot be: a name is empty or stands twice"):
        read(tmp_path, "label_names: [neg, Neg]")


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("class_weights: [1, 0]", "it takes a list of numbers above 0 or balanced"),
        ("class_weights: [1, -2]", "it takes a list of numbers above 0 or balanced"),
        ("class_weights: ballanced", "did you mean balanced?"),
        ("class_weights: [1, 2]\nnum_labels: 3", "say one number for each class"),
        ("label_smoothing_factor: 1.0", "it takes a number of at least 0 and below 1"),
        ("label_smoothing: 0.1", "did you mean label_smoothing_factor?"),
        ("early_stopping_patience: 2", "there is no evaluation without eval_dataset_name"),
        ("eval_dataset_name: e\nearly_stopping_threshold: 0.1", "it needs early_stopping_patience"),
        ("eval_dataset_name: e\nearly_stopping_patience: 0", "it takes a whole number of at least 1"),
    ],
)
def test_what_cannot_be_is_one_sentence_that_names_the_key(tmp_path, more, says):
    with pytest.raises(UserError) as mistake:
        read(tmp_path, more)
    key = more.splitlines()[-1].split(":")[0]
    assert says in str(mistake.value) and (key in str(mistake.value) or "class_weights" in str(mistake.value))


def test_label_smoothing_is_refused_only_where_the_loss_is_of_tokens(capsys):
    values = {"model_name_or_path": "m", "dataset_name": "d", "output_dir": "o", "label_smoothing_factor": 0.1}
    assert ClassificationRecipe.from_values(**values).label_smoothing_factor == 0.1
    with pytest.raises(UserError, match="label_smoothing_factor is not a key here"):
        Recipe.from_values(**values)
    for kind, refused in ((ClassificationRecipe, False), (Recipe, True)):
        with pytest.raises(SystemExit):
            read_recipe(["--help-all"], default_config=None, prog="p", description="d", kind=kind)
        _, _, others = capsys.readouterr().out.partition("Keys of other tools")
        assert ("label_smoothing_factor" in others) == refused


def test_balanced_weights_are_scikit_learns_and_a_wrong_number_of_weights_is_refused():
    labels = np.array([0] * 7 + [1] * 2 + [2] * 21)
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    weights = choose_weights("balanced", labels, 3)
    assert weights == pytest.approx(expected, rel=1e-12)
    assert ClassLoss(weights).denominator(labels) == pytest.approx(len(labels), rel=1e-6)
    assert ClassLoss().denominator(labels) == len(labels)
    with pytest.raises(UserError, match="class_weights has 2 numbers, and the data has 3 classes"):
        choose_weights([1.0, 2.0], labels, 3)
