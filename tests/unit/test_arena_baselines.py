"""The baselines: equivariant to the bit, and chosen without looking at what judges them."""

from math import log1p

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.battles import swapped

from isotune.evaluation.statistics.blending import blend, blend_weights, held_out_blend
from isotune.io.errors import UserError
from isotune.projects.arena.baselines.estimators import MEMBERS, check_grids
from isotune.projects.arena.baselines.features import (
    Text,
    answer_features,
    features,
    pair_features,
    prompt_features,
)
from isotune.projects.arena.baselines.fitted import BLEND, FittedModels
from isotune.projects.arena.baselines.run import fit_baselines
from isotune.projects.arena.battles import Battle, read_battles
from isotune.projects.arena.preference import score_preferences

SMALL_GRIDS = {
    "logistic_regression": {"C": [0.003]},
    "linear_svm": {"C": [0.0003]},
    "random_forest": {"n_estimators": [10]},
    "gradient_boosting": {"max_iter": [10], "max_leaf_nodes": [3, 4]},
}
TEXTS = st.text(st.characters(codec="utf-8"), max_size=80)


@pytest.fixture(scope="module")
def rows(shared_data):
    return read_battles(shared_data / "arena" / "train.csv", labelled=True).subset(range(0, 3300, 22))


@pytest.fixture(scope="module")
def fitted(rows):
    return fit_baselines(rows.battles, SMALL_GRIDS, folds=2, seed=3)


def test_exchanging_the_answers_exchanges_every_models_prediction_bit_for_bit(fitted, rows):
    given = fitted.predict(rows.battles)
    exchanged = fitted.predict([swapped(battle) for battle in rows.battles])
    assert set(given) == {"class_prior", *MEMBERS, BLEND}
    for name, found in given.items():
        assert found[:, [1, 0, 2]].tobytes() == exchanged[name].tobytes(), name
        np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-12)
        assert (found > 0).all()
    assert np.ptp(given[BLEND][:, 0] - given[BLEND][:, 1]) > 0.1


def test_a_rows_prediction_does_not_depend_on_what_else_is_predicted(fitted, rows):
    whole, some = fitted.predict(rows.battles), fitted.predict(rows.battles[7:40:3])
    for name, found in some.items():
        assert found.tobytes() == whole[name][7:40:3].tobytes(), name


def test_the_same_seed_chooses_and_predicts_the_same(fitted, rows):
    again = fit_baselines(rows.battles, SMALL_GRIDS, folds=2, seed=3)
    assert again.weights == fitted.weights
    one, other = (each.predict(rows.battles[:9])[BLEND] for each in (again, fitted))
    assert one.tobytes() == other.tobytes()


def test_nothing_is_learned_about_a_row_from_its_own_label_or_from_its_prompts_other_rows():
    """Labels are a coin of the prompt, repeated in every row of it: only a leak could predict them held out."""
    chance = np.random.default_rng(0)
    said = [f"w{n}" for n in range(60)]
    battles = []
    for prompt in range(40):
        label = int(chance.integers(3))
        for copy in range(4):
            a, b = (" ".join(chance.choice(said, 12)) for _ in range(2))
            battles.append(Battle(f"{prompt}.{copy}", (f"unique{prompt} prompt{prompt}",), (a,), (b,), label))
    grids = {"random_forest": {"n_estimators": [30], "min_samples_leaf": [1]}, "logistic_regression": {"C": [0.1]}}
    found = fit_baselines(battles, grids, folds=4, seed=0)
    labels = np.array([battle.label for battle in battles])
    for name in grids:
        own = found.predict(battles)[name][np.arange(160), labels]
        held_out = found.held_out[name][np.arange(160), labels]
        assert -np.log(own).mean() < 0.9 < 1.0 < -np.log(held_out).mean(), name


@given(TEXTS, TEXTS, TEXTS)
@settings(max_examples=60, deadline=None)
def test_features_of_any_text_are_finite_and_turn_their_sign_with_the_answers(prompt, one, other):
    texts = Text(prompt), Text(one), Text(other)
    given, swapped = features(*texts, 1)
    count = len(answer_features(texts[1], texts[0]))
    rest = len(pair_features(texts[1], texts[2])) + len(prompt_features(texts[0])) + 1  # and the number of turns
    assert np.isfinite(given).all() and len(given) == 2 * count + rest
    assert (given[:count] == -swapped[:count]).all() and (given[count:] == swapped[count:]).all()
    assert features(texts[0], texts[2], texts[1], 1)[0].tobytes() == swapped.tobytes()
    assert pair_features(texts[1], texts[2]) == pair_features(texts[2], texts[1])


def test_documented_features_say_what_their_names_say():
    prompt = Text("List three fruits that grow in 2024 gardens.")
    listed = answer_features(Text("1. Apples\n2. Pears\n3. Gardens of 2024"), prompt)
    refused = answer_features(Text("I'm sorry, but as an AI language model I cannot do that."), prompt)
    code = answer_features(Text("```python\nprint(12)\n```\nprint(12)\nprint(12)"), prompt)
    assert listed["list_items"] == listed["numbered_items"] == log1p(3) and refused["list_items"] == 0
    assert refused["begins_with_refusal"] == 1 and refused["refusals"] == log1p(3) and listed["refusals"] == 0
    assert code["code_blocks"] == log1p(2) and code["repeated_sentences_share"] > 0
    assert (
        listed["prompt_numbers_covered"] == 1 and listed["prompt_covered"] == 2 / 5
    )  # of list, fruit, grow, 2024, garden
    assert refused["lines"] == 0 and listed["lines"] == log1p(2)
    russian = answer_features(Text("Яблоки и груши"), prompt)
    assert russian["same_script"] == 0 and russian["other_than_latin"] == 1
    assert Text("苹果2个").words == ("苹", "果", "2", "个")[:2] + Text("2个").words
    assert Text("The geese were running").content == ("goose", "run")


def test_blend_weights_are_the_best_there_are_and_those_of_a_fold_do_not_see_it():
    from scipy.optimize import minimize

    chance = np.random.default_rng(1)
    labels = chance.integers(0, 3, 400)
    noisy = [chance.dirichlet(np.ones(3), 400) + sharp * np.eye(3)[labels] for sharp in (0.0, 0.5, 0.7)]
    held_out = [one / one.sum(axis=1, keepdims=True) for one in noisy]

    def loss(free):
        weights = np.exp(free) / np.exp(free).sum()
        return -np.log(sum(w * one for w, one in zip(weights, held_out, strict=True))[np.arange(400), labels]).mean()

    weights = blend_weights(held_out, labels)
    best = minimize(loss, np.zeros(3), method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12, "maxiter": 4000})
    mixed = blend(held_out, weights)
    assert -np.log(mixed[np.arange(400), labels]).mean() == pytest.approx(best.fun, abs=1e-7)
    assert weights.sum() == pytest.approx(1) and (weights >= 0).all()
    fold_of = np.arange(400) % 4
    folds = [(np.flatnonzero(fold_of != fold), np.flatnonzero(fold_of == fold)) for fold in range(4)]
    found = held_out_blend(held_out, labels, folds)
    changed = np.where(fold_of == 2, (labels + 1) % 3, labels)
    assert (held_out_blend(held_out, changed, folds)[fold_of == 2] == found[fold_of == 2]).all()


@pytest.mark.parametrize(
    ("grids", "says"),
    [
        ({"forest": {}}, "there is no model 'forest'; there are logistic_regression"),
        ({"linear_svm": {"c": [1]}}, "linear_svm has no parameter 'c'"),
        ({"linear_svm": {"C": 1}}, r"write the values as a list"),
        ({"logistic_regression": {"C": [-1.0]}}, "The 'C' parameter of LogisticRegression must be"),
    ],
)
def test_a_grid_that_no_model_takes_is_refused(grids, says):
    with pytest.raises(UserError, match=says):
        check_grids(grids)


def test_log_loss_is_scikit_learns_and_a_model_that_guesses_is_said_to(rows):
    from sklearn.metrics import log_loss

    labels = rows.labels
    chance = np.random.default_rng(2)
    predictions = {
        "uniform": np.full((len(rows), 3), 1 / 3),
        "noise": chance.dirichlet(np.full(3, 9), len(rows)),
        "good": 0.5 * np.eye(3)[labels] + 0.5 * chance.dirichlet(np.ones(3), len(rows)),
    }
    scores = score_preferences(rows, predictions, main="good")
    for name, found in predictions.items():
        loss, (low, high) = scores.log_loss(name)
        assert loss == pytest.approx(log_loss(labels, found, labels=[0, 1, 2]), rel=1e-9) and low <= loss <= high
        assert scores.metrics[f"accuracy_{name}"] == (found.argmax(axis=1) == labels).mean()
    assert scores.uniform_warning("good") is None
    assert "uniform is not better than uniform guessing with 95% confidence" in scores.table()
    assert "noise is not better than uniform guessing with 95% confidence" in scores.table()


def test_intervals_resample_prompts_so_that_copies_of_rows_do_not_make_them_narrower(rows):
    from isotune.projects.arena.battles import Battles

    one_a_prompt = rows.subset(np.unique([b.group() for b in rows.battles], return_index=True)[1].tolist())
    four = Battles("four", one_a_prompt.battles * 4, 0, 0)
    chance = np.random.default_rng(3).dirichlet(np.ones(3), len(one_a_prompt))
    once = score_preferences(one_a_prompt, {"m": chance}, main="m").intervals["log_loss"]
    copied = score_preferences(four, {"m": np.tile(chance, (4, 1))}, main="m").intervals["log_loss"]
    assert copied == pytest.approx(once, rel=1e-5)


def test_models_that_were_kept_predict_as_those_that_were_fitted_bit_for_bit(fitted, rows, tmp_path):
    fitted.save(tmp_path / "model")
    kept = FittedModels.load(tmp_path / "model")
    assert kept.weights == fitted.weights
    given, again = (models.predict(rows.battles) for models in (fitted, kept))
    assert list(again) == list(given)
    for name, found in given.items():
        assert found.tobytes() == again[name].tobytes(), name


@pytest.mark.parametrize("content", ["[" * 100_000, "[1]", '{"weights": {"a": 1e999}}', '{"weights": 5}', ""])
def test_weights_of_a_blend_that_are_none_are_one_sentence(tmp_path, content):
    (tmp_path / "blend.json").write_text(content)
    with pytest.raises(UserError, match=r"blend\.json") as refused:
        FittedModels.load(tmp_path)
    assert "\n" not in str(refused.value)
