"""What a user types for the Arena, on real rows: baselines and encoder, their files, and what is said of a mistake."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tests.battles import swapped
from tests.launching import start, write_recipe

import isotune
from isotune.cli import main
from isotune.evaluation.ensemble import build_ensemble
from isotune.evaluation.results import read_result
from isotune.io.errors import AlreadyDone, UserError
from isotune.projects.arena.baselines.run import run_baselines
from isotune.projects.arena.recipes import read_arena_recipe
from isotune.projects.arena.submission import check_submission

SCRIPT = "train/arena.py"
TRAINED_ROWS, TEST_ROWS = 48, 10
SMALL_GRIDS = {
    "logistic_regression": {"C": [0.001, 0.003]},
    "gradient_boosting": {"max_iter": [5], "max_leaf_nodes": [3]},
}
ENCODER = {
    "method": "encoder", "model_name_or_path": "builtin:bert-tiny", "tune": "lora", "max_seq_length": 64,
    "global_batch_size": 16, "microbatch_tokens": 512, "num_train_epochs": 1, "learning_rate": 1e-3,
    "eval_split_share": 0.25, "disable_tqdm": True,
}  # fmt: skip


def first_rows(source, target, count):
    with source.open(encoding="utf-8", newline="") as lines:
        rows = [row for row, _ in zip(csv.reader(lines), range(count + 1), strict=False)]
    with target.open("w", encoding="utf-8", newline="") as lines:
        csv.writer(lines).writerows(rows)


@pytest.fixture(scope="module")
def competition(shared_data_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("arena")
    for name, count in (("train", TRAINED_ROWS), ("test", TEST_ROWS), ("sample_submission", TEST_ROWS),
                        ("test_labels", TEST_ROWS)):  # fmt: skip
        first_rows(shared_data_folder / "arena" / f"{name}.csv", folder / f"{name}.csv", count)
    return folder


@pytest.fixture(scope="module")
def shared_data_folder():
    from tests.conftest import SHARED_DATA

    if not SHARED_DATA.is_dir():
        pytest.skip(f"no real data at {SHARED_DATA}: set ISOTUNE_TEST_DATA to a folder that has it")
    return SHARED_DATA


def baselines_recipe(competition, **more):
    return {"method": "baselines", "dataset_name": str(competition), "folds": 2, "grids": SMALL_GRIDS, **more}


@pytest.fixture(scope="module")
def baselines(competition, tmp_path_factory):
    recipe = baselines_recipe(competition, test_labels=str(competition / "test_labels.csv"))
    return start(tmp_path_factory.mktemp("baselines"), recipe, script=SCRIPT)


@pytest.fixture(scope="module")
def encoder(competition, tmp_path_factory):
    recipe = {**ENCODER, "dataset_name": str(competition), "test_labels": str(competition / "test_labels.csv")}
    return start(tmp_path_factory.mktemp("encoder"), recipe, script=SCRIPT)


@pytest.mark.parametrize("which", ["baselines", "encoder"])
def test_a_run_leaves_a_right_submission_and_predictions_that_give_the_log_loss_it_says(competition, which, request):
    finished = request.getfixturevalue(which)
    submission = finished.run / "submission.csv"
    assert check_submission(submission, competition / "sample_submission.csv") == ([], TEST_ROWS)
    with submission.open(newline="") as lines:
        _, *rows = csv.reader(lines)
    submitted = {row[0]: [float(cell) for cell in row[1:]] for row in rows}
    with (competition / "test_labels.csv").open(newline="") as lines:
        _, *answers = csv.reader(lines)
    losses = [-np.log(submitted[row[0]][row[1:].index("1")]) for row in answers]
    scored = read_result(finished.run / "eval" / "arena_test")
    assert scored.metrics["log_loss"] == pytest.approx(np.mean(losses), rel=1e-9)
    assert {one["id"]: one["probabilities"] for one in scored.predictions} == submitted
    held_out = read_result(finished.run / "eval" / "arena")
    truths = [one["probabilities"][one["label"]] for one in held_out.predictions]
    assert held_out.metrics["log_loss"] == pytest.approx(-np.log(truths).mean(), rel=1e-9)
    low, high = held_out.intervals["log_loss"]
    assert low < held_out.metrics["log_loss"] < high
    assert held_out.facts["label_names"] == ["a", "b", "tie"] and held_out.facts["kind"] == "classification"


def test_baselines_print_every_model_with_its_interval_and_predict_every_training_row(baselines):
    for name in ("class_prior", "logistic_regression", "gradient_boosting", "blend"):
        assert any(line.startswith(name) for line in baselines.stdout.splitlines())
    held_out = read_result(baselines.run / "eval" / "arena")
    assert len(held_out.predictions) == TRAINED_ROWS
    chosen = json.loads((baselines.run / "chosen.json").read_text())
    assert sum(one["weight"] for one in chosen.values()) == pytest.approx(1)
    assert chosen["logistic_regression"]["parameters"]["C"] in (0.001, 0.003)


def test_a_written_recipe_of_baselines_is_the_same_run_and_so_nothing_is_left_to_do(baselines, tmp_path):
    again = ["--config", str(baselines.run / "recipe.yaml")]
    with pytest.raises(AlreadyDone, match="holds the finished run of this recipe"):
        run_baselines(read(*again))
    with pytest.raises(UserError, match="holds the run of another recipe"):
        run_baselines(read(*again, "--seed", "3"))
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match="is not empty and is not a run of baselines"):
        run_baselines(read(*again, "--output_dir", str(tmp_path)))


def test_an_encoder_is_trained_on_both_orders_of_every_row_that_is_not_kept(encoder):
    kept = len(read_result(encoder.run / "eval" / "arena").predictions)
    assert 0 < kept < TRAINED_ROWS
    assert sum(line["documents"] for line in encoder.steps) == 2 * (TRAINED_ROWS - kept)
    assert encoder.evaluations[-1]["eval_documents"] == 2 * kept


def test_an_encoders_prediction_is_equivariant_to_the_bit(encoder, competition):
    import torch

    from isotune.evaluation.models import load_run_classifier
    from isotune.projects.arena.battles import read_battles
    from isotune.projects.arena.encoder import predict_battles

    classifier = load_run_classifier(encoder.run, torch.device("cpu"), torch.float32)
    rows = read_battles(competition / "train.csv", labelled=True)
    given = predict_battles(classifier, rows.battles, 64)
    exchanged = predict_battles(classifier, [swapped(battle) for battle in rows.battles], 64)
    assert given[:, [1, 0, 2]].tobytes() == exchanged.tobytes()
    assert np.ptp(given[:, 0]) > 0


def test_a_broken_row_is_one_sentence_with_status_2_and_nothing_is_written(competition, tmp_path):
    broken = tmp_path / "data"
    shutil.copytree(competition, broken)
    text = (broken / "train.csv").read_text(encoding="utf-8")
    (broken / "train.csv").write_text(text + '99,x,y,"[""cut","[""a""]","[""b""]",1,0,0\n', encoding="utf-8")
    finished = start(tmp_path, baselines_recipe(broken), script=SCRIPT, expect=2)
    (line,) = finished.stderr.splitlines()
    assert line.startswith("error: ") and f"row {TRAINED_ROWS + 1} (id 99), column prompt: no JSON list" in line
    assert not finished.run.exists()


def test_keys_that_mean_nothing_here_and_grids_of_no_model_are_refused(competition, tmp_path):
    said = write_recipe(tmp_path, baselines_recipe(competition, grids={"forest": {}}))
    with pytest.raises(UserError, match="there is no model 'forest'"):
        run_baselines(read("--config", str(said)))
    said = write_recipe(tmp_path, baselines_recipe(competition, folds=40))
    with pytest.raises(UserError, match=r"40 folds need 120 different prompts, .* has 41"):
        run_baselines(read("--config", str(said)))
    said = write_recipe(tmp_path, {**ENCODER, "dataset_name": str(competition), "dataset_text_field": "prompt"})
    with pytest.raises(UserError, match="dataset_text_field has no effect: the Arena's files have their own columns"):
        read("--config", str(said))
    said = write_recipe(tmp_path, baselines_recipe(competition, learning_rate=1))
    with pytest.raises(UserError, match="learning_rate is not a key"):
        read("--config", str(said))


def read(*argv):
    return read_arena_recipe(argv, default_config=Path("train/configs/arena_bert.yaml"), prog="train/arena.py")


def predict(capsys, *words, expect=0):
    with pytest.raises(SystemExit) as leaving:
        main(["predict", *map(str, words)])
    said = capsys.readouterr()
    assert (leaving.value.code or 0) == expect, said
    return said


@pytest.mark.parametrize(("which", "digits"), [("baselines", None), ("encoder", 1e-6)])
def test_a_finished_run_predicts_new_rows_as_its_submission_does(competition, which, digits, request, tmp_path, capsys):
    run = request.getfixturevalue(which).run
    rows = (competition / "test.csv", tmp_path / "p.csv", tmp_path / "p.jsonl")
    for output in rows[1:]:
        predict(capsys, run, "--input", rows[0], "--output", output, "--part_rows", 4)
    assert check_submission(rows[1], competition / "sample_submission.csv") == ([], TEST_ROWS)
    tables = []
    for file in (run / "submission.csv", rows[1]):
        with file.open(newline="") as lines:
            tables.append([[float(cell) for cell in row] for row in list(csv.reader(lines))[1:]])
    if digits is None:
        assert tables[0] == tables[1]
    np.testing.assert_allclose(tables[1], tables[0], atol=digits or 0)
    lines = [json.loads(line) for line in rows[2].read_text().splitlines()]
    for line, (own_id, *probabilities) in zip(lines, tables[1], strict=True):
        assert (int(line["id"]), line["probabilities"]) == (int(own_id), probabilities)
        assert line["prediction_name"] == ("a", "b", "tie")[int(np.argmax(probabilities))]
    refused = predict(capsys, run, "a text", expect=2)
    assert "reads battles, a prompt with two answers" in refused.err
    with pytest.raises(UserError, match="reads battles and no texts"):
        isotune.load(run).predict("a text")


def test_a_model_file_that_holds_more_than_a_baseline_is_refused_and_runs_nothing(baselines, tmp_path):
    import functools
    import os

    import skops.io

    from isotune.projects.arena.baselines.fitted import FittedModels

    folder = tmp_path / "model"
    shutil.copytree(baselines.run / "model", folder)
    assert sorted(file.name for file in folder.iterdir()) == [
        "blend.json", "features.skops", "gradient_boosting.skops", "logistic_regression.skops"]  # fmt: skip
    trap = tmp_path / "trap"
    skops.io.dump(functools.partial(os.mkdir, str(trap)), folder / "gradient_boosting.skops")
    with pytest.raises(UserError, match=r"gradient_boosting.skops holds .*mkdir.*nothing of it was loaded"):
        FittedModels.load(folder)
    assert not trap.exists()
    shutil.copy(folder / "features.skops", folder / "gradient_boosting.skops")
    with pytest.raises(UserError, match=r"gradient_boosting.skops holds dict, which no baseline is made of"):
        FittedModels.load(folder)
    (folder / "gradient_boosting.skops").write_bytes(b"PK broken")
    with pytest.raises(UserError, match=r"gradient_boosting.skops cannot be read"):
        FittedModels.load(folder)
    (folder / "gradient_boosting.skops").unlink()
    with pytest.raises(UserError, match=r"there is no file .*gradient_boosting.skops"):
        FittedModels.load(folder)
    (folder / "blend.json").unlink()
    with pytest.raises(UserError, match=r"holds no blend\.json"):
        FittedModels.load(folder)


def test_the_encoder_joins_the_baselines_in_a_blend_of_the_same_rows(baselines, encoder, tmp_path):
    runs = [baselines.run, encoder.run]
    made = build_ensemble(runs, tmp_path / "blend", name="arena_test", weights="fitted", folds=3, resamples=200)
    found = read_result(made.folder)
    members = [{row["id"]: row for row in read_result(run / "eval" / "arena_test").predictions} for run in runs]
    for row in found.predictions:
        one, other = (np.array(member[row["id"]]["probabilities"]) for member in members)
        low, high = np.minimum(one, other) - 1e-9, np.maximum(one, other) + 1e-9
        assert ((low <= row["probabilities"]) & (row["probabilities"] <= high)).all()
        assert row["label"] == members[0][row["id"]]["label"] and row["group"] == members[0][row["id"]]["group"]
    with pytest.raises(UserError, match="cannot be compared"):  # the encoder kept other rows than all of the folds
        build_ensemble(runs, tmp_path / "none", name="arena")


@pytest.mark.slow
def test_the_blend_of_encoder_and_baselines_is_at_least_as_good_as_the_member_that_cross_validation_chooses(
    shared_data_folder, tmp_path
):
    folder = tmp_path / "data"
    folder.mkdir()
    for name, count in (("train", 800), ("test", 674), ("sample_submission", 674), ("test_labels", 674)):
        first_rows(shared_data_folder / "arena" / f"{name}.csv", folder / f"{name}.csv", count)
    answers = {"dataset_name": str(folder), "test_labels": str(folder / "test_labels.csv")}
    grids = {"linear": {"logistic_regression": {"C": [0.001, 0.003]}},
             "trees": {"gradient_boosting": {"max_iter": [60], "max_leaf_nodes": [4]}}}  # fmt: skip
    for name, grid in grids.items():
        recipe = {"method": "baselines", "folds": 3, "grids": grid, **answers}
        run_baselines(read("--config", str(write_recipe(tmp_path / name, recipe))))
    recipe = {**ENCODER, **answers, "tune": "full", "num_train_epochs": 1, "train_orders": "one"}
    start(tmp_path / "encoder", recipe, script=SCRIPT)
    runs = [tmp_path / name / "run" for name in (*grids, "encoder")]
    chosen = min(runs, key=lambda run: read_result(run / "eval" / "arena").metrics["log_loss"])
    made = build_ensemble(runs, tmp_path / "blend", name="arena_test", weights="fitted", resamples=500)
    low, high = made.scores.intervals["log_loss"]
    best = read_result(chosen / "eval" / "arena_test").metrics["log_loss"]
    assert made.scores.metrics["log_loss"] <= best and low < made.scores.metrics["log_loss"] < high


def test_an_encoder_is_evaluated_like_any_classifier_on_the_rows_that_it_kept_or_on_a_file(
    encoder, baselines, competition, tmp_path, capsys
):
    def evaluate(run, *words, expect=0):
        with pytest.raises(SystemExit) as leaving:
            main(["eval", str(run), *map(str, words)])
        assert (leaving.value.code or 0) == expect, capsys.readouterr()
        return capsys.readouterr()

    evaluate(encoder.run, "--resamples", 100, "--output_dir", tmp_path / "kept")
    found, own = read_result(tmp_path / "kept"), read_result(encoder.run / "eval" / "arena")
    assert found.facts["rows_sha256"] == own.facts["rows_sha256"]
    for row, other in zip(found.predictions, own.predictions, strict=True):
        assert (row["id"], row["label"], row["group"]) == (other["id"], other["label"], other["group"])
        np.testing.assert_allclose(row["probabilities"], other["probabilities"], atol=1e-6)
    for name in ("log_loss", "accuracy", "expected_calibration_error"):
        assert found.metrics[name] == pytest.approx(own.metrics.get(name, own.metrics.get(f"{name}_encoder")), abs=1e-6)
    assert {"brier", "roc_auc", "precision[a]"} <= found.metrics.keys()
    for picture in ("reliability.png", "confusion_matrix.png", "precision_recall.png"):
        assert (tmp_path / "kept" / picture).is_file(), picture
    evaluate(encoder.run, "--dataset_name", competition / "train.csv", "--limit", 9, "--no_pictures",
             "--resamples", 100)  # fmt: skip
    assert len(read_result(encoder.run / "eval" / "train").predictions) == 9
    assert "is a run of baselines" in evaluate(baselines.run, expect=2).err
    assert "--max_seq_length has no effect" in evaluate(encoder.run, "--max_seq_length", 9, expect=2).err
    assert "is no file" in evaluate(encoder.run, "--dataset_name", competition, expect=2).err
