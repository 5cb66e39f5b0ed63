"""A blend of evaluations: rows and classes are aligned, or refused; weights are fitted without the row they blend."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss
from sklearn.model_selection import GroupKFold
from tests.building import small_encoder
from transformers import AutoModelForSequenceClassification

from isotune.cli import main
from isotune.data.classification.predictions import prediction_lines
from isotune.data.sources.source import Source
from isotune.evaluation.comparison import compare_runs
from isotune.evaluation.distributed_eval import Ranks
from isotune.evaluation.ensemble import build_ensemble
from isotune.evaluation.models import load_model_classifier
from isotune.evaluation.prediction.ensembles import EnsemblePredictor, SavedEnsemble, open_ensemble, read_ensemble
from isotune.evaluation.results import read_result, write_result
from isotune.evaluation.statistics.blending import blend, blend_weights
from isotune.evaluation.statistics.resampling import Scores
from isotune.io.errors import UserError
from isotune.report.html_report import write_report

ROWS, NAMES = 240, ["bad", "fair", "good"]


def member(folder: Path, labels: np.ndarray, outputs: np.ndarray, **values) -> Path:
    """An evaluation in `folder`/eval/test, of rows in a seeded order of their own."""
    unsaid = {"task_type": "single_label", "names": NAMES, "groups": None, "texts": None, "thresholds": None}
    given = SimpleNamespace(**unsaid | values)
    lines = prediction_lines(given.task_type, list(range(len(labels))), labels, outputs, given.names)
    if given.groups is not None:
        lines = [{**line, "group": f"g{group}"} for line, group in zip(lines, given.groups, strict=True)]
    facts = {"kind": "classification", "model": folder.name, "dataset_name": "d", "dataset_split": "test"}
    facts |= {"label_names": given.names, "task_type": given.task_type}
    facts |= {"label_thresholds": given.thresholds} if given.thresholds else {}
    texts = given.texts or [f"text {row}" for row in range(len(labels))]
    write_result(folder / "eval" / "test", facts, Scores({}, {}), lines, texts)
    return folder


def noisy(labels: np.ndarray, sharp: float, seed: int) -> np.ndarray:
    """Probabilities that know the class by so much."""
    made = np.random.default_rng(seed).dirichlet(np.ones(3), len(labels)) + sharp * np.eye(3)[labels]
    return made / made.sum(axis=1, keepdims=True)


@pytest.fixture
def labels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 3, ROWS)


@pytest.fixture
def outputs(labels) -> list[np.ndarray]:
    return [noisy(labels, sharp, seed) for seed, sharp in enumerate((0.2, 0.6, 0.8))]


@pytest.fixture
def runs(tmp_path, labels, outputs) -> list[Path]:
    return [member(tmp_path / f"run{n}", labels, one) for n, one in enumerate(outputs)]


def test_equal_weights_give_the_mean_and_the_scores_of_scikit_learn(runs, labels, outputs, tmp_path):
    made = build_ensemble(runs, tmp_path / "both", resamples=200)
    found = read_result(made.folder)
    mean = np.mean(outputs, axis=0)
    np.testing.assert_allclose([row["probabilities"] for row in found.predictions], mean, rtol=1e-12)
    assert found.metrics["log_loss"] == pytest.approx(log_loss(labels, mean), rel=1e-9)
    assert found.metrics["accuracy"] == (mean.argmax(1) == labels).mean()
    low, high = found.intervals["accuracy"]
    assert low < found.metrics["accuracy"] < high
    assert [one["weight"] for one in found.facts["ensemble"]["members"]] == pytest.approx([1 / 3] * 3)
    losses = [one["log_loss"] for one in found.facts["ensemble"]["members"]]
    assert losses == pytest.approx([log_loss(labels, one) for one in outputs], rel=1e-9)


def test_fitted_weights_of_a_row_do_not_see_it_or_its_group(tmp_path, labels, outputs):
    groups = np.arange(ROWS) // 4
    runs = [member(tmp_path / f"g{n}", labels, one, groups=groups) for n, one in enumerate(outputs)]
    made = build_ensemble(runs, tmp_path / "fitted", weights="fitted", folds=3, seed=5, resamples=200)
    rows = read_result(made.folder).predictions
    found = np.array([row["probabilities"] for row in rows])
    assert [row["group"] for row in rows] == [f"g{group}" for group in groups]
    changed = labels.copy()
    changed[:4] = (changed[:4] + 1) % 3  # the labels of one group
    others = [member(tmp_path / f"c{n}", changed, one, groups=groups) for n, one in enumerate(outputs)]
    again = build_ensemble(others, tmp_path / "again", weights="fitted", folds=3, seed=5, resamples=200)
    moved = np.array([row["probabilities"] for row in read_result(again.folder).predictions])
    numbered = np.unique([f"g{group}" for group in groups], return_inverse=True)[1]
    folds = GroupKFold(3, shuffle=True, random_state=5).split(groups, groups=numbered)
    own = next(test for _, test in folds if 0 in test)
    others_of = np.setdiff1d(np.arange(ROWS), own)
    assert (moved[own] == found[own]).all() and (moved[others_of] != found[others_of]).any(axis=1).all()
    weights = np.array([one.weight for one in made.members])
    assert weights.sum() == pytest.approx(1) and weights.argmax() == 2
    assert made.loss == pytest.approx(log_loss(labels, found), rel=1e-9)


def test_rows_and_classes_are_aligned_by_content_and_name(tmp_path, labels, outputs, runs):
    order = [2, 0, 1]
    turned = member(tmp_path / "turned", np.argsort(order)[labels], outputs[1][:, order],
                    names=[NAMES[k] for k in order])  # fmt: skip
    made, plain = (
        build_ensemble(both, tmp_path / name, resamples=200)
        for name, both in (("a", [runs[0], turned]), ("b", [runs[0], runs[1]]))
    )
    assert [row["probabilities"] for row in read_result(made.folder).predictions] == [
        row["probabilities"] for row in read_result(plain.folder).predictions
    ]


def test_what_is_not_of_the_same_rows_or_classes_is_refused(tmp_path, labels, outputs, runs):
    other_texts = member(tmp_path / "texts", labels, outputs[0], texts=[f"other {row}" for row in range(ROWS)])
    fewer = member(tmp_path / "fewer", labels[:-1], outputs[0][:-1])
    others = member(tmp_path / "others", labels, outputs[0], names=["x", "y", "z"])
    numbered = labels[:ROWS].copy()
    numbered[7] = (numbered[7] + 1) % 3
    wrong = member(tmp_path / "wrong", numbered, outputs[0])
    cases = {"not the texts of the rows": other_texts, "1 row only in": fewer, "row 7 has the label": wrong}
    cases["the classes are bad, fair, good"] = others
    for sentence, run in cases.items():
        with pytest.raises(UserError, match=sentence):
            build_ensemble([runs[0], run], tmp_path / "none")
    with pytest.raises(UserError, match="needs two runs"):
        build_ensemble(runs[:1], tmp_path / "none")
    with pytest.raises(UserError, match="--folds is 300, and there are 240 rows"):
        build_ensemble(runs, tmp_path / "none", weights="fitted", folds=300)
    assert not (tmp_path / "none").exists()


def test_several_labels_and_numbers_are_blended_too(tmp_path):
    draw = np.random.default_rng(3)
    labels = draw.integers(0, 2, (90, 2))
    several = [np.clip(draw.uniform(0.2, 0.6, (90, 2)) + s * (labels - 0.5), 0.01, 0.99) for s in (0.1, 0.7)]
    kind = {"task_type": "multi_label", "names": ["a", "b"]}
    runs = [member(tmp_path / f"m{n}", labels, one, **kind) for n, one in enumerate(several)]
    made = build_ensemble(runs, tmp_path / "several", weights="fitted", resamples=200)
    assert made.members[1].weight > 0.9
    assert made.loss is not None and made.members[0].loss is not None and made.loss < made.members[0].loss
    numbers = draw.normal(size=90)
    guesses = [numbers + draw.normal(size=90) for _ in range(2)]
    kind = {"task_type": "regression", "names": None}
    runs = [member(tmp_path / f"r{n}", numbers, one, **kind) for n, one in enumerate(guesses)]
    found = read_result(build_ensemble(runs, tmp_path / "numbers", resamples=200).folder)
    np.testing.assert_allclose([row["prediction"] for row in found.predictions], np.mean(guesses, axis=0), rtol=1e-12)
    with pytest.raises(UserError, match="these are numbers"):
        build_ensemble(runs, tmp_path / "none", weights="fitted")


def test_label_thresholds_of_the_members_decide_and_other_ones_are_refused(tmp_path):
    labels = np.array([[1, 0], [0, 1], [1, 1], [0, 0]] * 3)
    outputs = [np.where(labels == 1, 0.35, 0.25), np.where(labels == 1, 0.45, 0.15)]
    kind = {"task_type": "multi_label", "names": ["a", "b"]}
    runs = [member(tmp_path / f"m{n}", labels, one, **kind, thresholds=[0.3, 0.3]) for n, one in enumerate(outputs)]
    found = read_result(build_ensemble(runs, tmp_path / "both", resamples=200).folder)
    assert [row["prediction"] for row in found.predictions] == [np.flatnonzero(row).tolist() for row in labels]
    assert found.facts["label_thresholds"] == [0.3, 0.3]
    other = member(tmp_path / "other", labels, outputs[0], **kind)
    with pytest.raises(UserError, match="other label thresholds"):
        build_ensemble([runs[0], other], tmp_path / "none")


def test_a_blend_is_compared_and_reported_like_a_run_and_another_one_takes_another_folder(runs, tmp_path, capsys):
    words = ["ensemble", *map(str, runs), "--weights", "fitted", "--resamples", "200"]
    with pytest.raises(SystemExit) as leaving:
        main([*words, "--output_dir", str(tmp_path / "blend")])
    said = capsys.readouterr().out
    assert not leaving.value.code and "below the best member's" in said and "log_loss" in said
    compared = compare_runs([runs[2], tmp_path / "blend"], resamples=200)
    assert compared.rows == ROWS
    page = write_report([runs[2], tmp_path / "blend"], tmp_path / "page.html").read_text()
    assert "blend" in page
    again = build_ensemble(runs[:2], tmp_path / "blend", resamples=200)
    assert again.folder.name.startswith("test-")  # beside the first one, which stays
    kept = json.loads((tmp_path / "blend" / "eval" / "test" / "metrics.json").read_text())
    assert len(kept["ensemble"]["members"]) == 3
    with pytest.raises(SystemExit) as leaving:
        main([*words, "--weights", "median"])
    assert leaving.value.code == 2 and "--weights is median" in capsys.readouterr().err


def as_runs(folders: list[Path]) -> list[Path]:
    """These folders as finished runs of classifiers, as far as an ensemble looks."""
    for folder in folders:
        (folder / "recipe.yaml").write_text("task: classification\n")
        (folder / "model").mkdir()
    return folders


def test_what_predicts_with_the_blend_is_written_where_all_members_are_runs_of_classifiers(runs, tmp_path):
    out = tmp_path / "both"
    made = build_ensemble(as_runs(runs), out, resamples=100)
    saved = read_ensemble(out)
    assert saved.runs == [str(run) for run in runs] and saved.weights == pytest.approx([1 / 3] * 3)
    assert (saved.task_type, saved.label_names) == ("single_label", NAMES)
    assert f"isotune predict {out} TEXT" in made.table() and "fitted to" not in made.table()
    (runs[0] / "recipe.yaml").unlink()
    again = build_ensemble(runs, out, resamples=100)
    assert again.predicts_with is None and not (out / "ensemble.json").exists()
    (out / "ensemble.json").write_text('{"members": [{"run": "a"}]}')
    with pytest.raises(UserError, match=r"ensemble\.json: it holds no ensemble of runs"):
        read_ensemble(out)


def test_weights_are_fitted_to_the_labels_of_the_other_evaluation_that_is_named(tmp_path, labels, outputs):
    runs = [member(tmp_path / f"run{n}", labels, one) for n, one in enumerate(outputs)]
    others = np.random.default_rng(9).integers(0, 3, 90)
    seen = [noisy(others, sharp, 20 + seed) for seed, sharp in enumerate((0.8, 0.1, 0.3))]
    for run, one in zip(runs, seen, strict=True):
        texts = [f"other {row}" for row in range(90)]
        (member(run / "made", others, one, texts=texts) / "eval" / "test").rename(run / "eval" / "dev")
    made = build_ensemble(runs, tmp_path / "out", weights="fitted", name="test", fit_on="dev", resamples=100)
    weights = blend_weights(seen, others)
    assert [one.weight for one in made.members] == pytest.approx(weights.tolist())
    found = np.array([row["probabilities"] for row in read_result(made.folder).predictions])
    np.testing.assert_allclose(found, blend(outputs, weights), rtol=1e-9)
    assert "were fitted to the labels of dev" in made.table()
    fitted = build_ensemble(runs, tmp_path / "own", weights="fitted", name="test", folds=3, resamples=100)
    assert "to the labels of these rows; each row is blended by weights of the other 2 of 3 folds" in fitted.table()
    for fit_on, how, says in (("dev", "equal", "has no effect"), ("test", "fitted", "has the rows that are blended")):
        with pytest.raises(UserError, match=says):
            build_ensemble(runs, tmp_path / "none", weights=how, name="test", fit_on=fit_on, resamples=100)


def test_an_ensemble_predicts_the_weighted_mean_by_the_names_of_the_classes(tmp_path):
    folders = []
    for number, names in enumerate((["bad", "good"], ["good", "bad"])):
        folder = small_encoder(tmp_path / f"encoder{number}", "bert")
        config = {"id2label": dict(enumerate(names)), "label2id": {name: k for k, name in enumerate(names)}}
        torch.manual_seed(number)
        AutoModelForSequenceClassification.from_pretrained(folder, **config).save_pretrained(folder)
        folders.append(folder)
    saved = SavedEnsemble(tmp_path, folders, np.array([0.25, 0.75]), "single_label", ["bad", "good"])
    device = torch.device("cpu")
    predictor = open_ensemble(saved, lambda run: load_model_classifier(run, device, torch.float32))
    texts, ranks = ["A fine meal.", "A slow waiter, and a long evening."], Ranks(0, 1, device)
    source = Source("rows", "", lambda: iter(()))
    taken = [(number, predictor.take({"text": text}, source, number)) for number, text in enumerate(texts)]
    lines = predictor.predict(predictor.prepare(taken), ranks).lines
    alone = [dict_of(load_model_classifier(folder, device, torch.float32), texts) for folder in folders]
    for row, line in enumerate(lines):
        expected = [0.25 * alone[0][row][name] + 0.75 * alone[1][row][name] for name in ("bad", "good")]
        assert line["probabilities"] == pytest.approx(expected, abs=1e-6)
        assert line["prediction_name"] == ("good" if expected[1] > expected[0] else "bad")
    other = replace(saved, label_names=["bad", "fair"])
    with pytest.raises(UserError, match="has the classes"):
        EnsemblePredictor(other, predictor.members)


def dict_of(classifier, texts: list[str]) -> list[dict[str, float]]:
    """The probability of each class by its name, by the stock model."""
    found = []
    for text in texts:
        ids = torch.tensor([classifier.tokenizer(text)["input_ids"]])
        stock = AutoModelForSequenceClassification.from_pretrained(classifier.name).eval()
        with torch.no_grad():
            shares = stock(ids).logits.softmax(-1)[0].tolist()
        found.append(dict(zip(classifier.label_names, shares, strict=True)))
    return found
