"""A run of the Arena's baselines: grid search by cross-validation, fit on all rows, blend, and the files of the run."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from joblib import Parallel, delayed
from sklearn.model_selection import GroupKFold, ParameterGrid
from threadpoolctl import threadpool_limits

from isotune.config.layers import Layer
from isotune.evaluation.statistics.blending import Splits, blend_weights, held_out_blend
from isotune.io.errors import AlreadyDone, UserError
from isotune.io.run_files import RECIPE, or_empty, read_recipe_values
from isotune.projects.arena.baselines.estimators import (
    BattleFeatures,
    FeatureMatrix,
    Grids,
    SwapAveraged,
    battle_features,
    check_grids,
)
from isotune.projects.arena.baselines.fitted import BLEND, PRIOR, FittedModels
from isotune.projects.arena.battles import CLASSES, Battle, Battles, read_competition
from isotune.projects.arena.preference import read_answers, write_preferences
from isotune.projects.arena.recipes import BaselinesRecipe
from isotune.projects.arena.submission import write_submission

SUBMISSION, CHOSEN = "submission.csv", "chosen.json"
MIN_PROMPTS_PER_FOLD = 3  # for the calibration inside a fold
MIN_PARALLEL_ROWS = 500  # each process takes seconds to import its libraries
HELD_OUT, TEST = "arena", "arena_test"

Log = Callable[[str], None]


@dataclass(frozen=True)
class Candidate:
    """A point of a model's grid: its held-out predictions, float64 [rows, 3], and their log loss in nats."""

    parameters: dict[str, Any]
    held_out: np.ndarray
    log_loss: float


@dataclass(frozen=True)
class Baselines(FittedModels):
    """Fitted models, with what chose them."""

    selected: dict[str, Candidate]  # the best one of each model
    # of BLEND and PRIOR, too: what models and weights that were fitted without its prompt predict for each training row
    held_out: dict[str, np.ndarray]  # float64 [rows, 3]


def run_baselines(recipe: BaselinesRecipe) -> None:
    """Search, fit and predict; writes recipe.yaml, chosen.json, submission.csv and eval/ to the run folder.

    Raises UserError, before anything is written, if the recipe, the data or the folder is wrong, and AlreadyDone if the
    folder has the finished run of this recipe.
    """
    started = time.perf_counter()
    recipe = recipe.with_values(grids=check_grids(recipe.grids))
    run = Path(recipe.output_dir)
    _check_folder(run, recipe)
    files = read_competition(Path(recipe.dataset_name))
    _check_enough(files.train, recipe.folds)
    answered = read_answers(Path(recipe.test_labels), files.test) if recipe.test_labels else None
    for battles in (files.train, files.test):
        print(battles.table(), flush=True)

    def log(line: str) -> None:
        print(f"{time.perf_counter() - started:6.0f} s  {line}", flush=True)

    assert recipe.grids is not None
    jobs = -1 if len(files.train) > MIN_PARALLEL_ROWS else 1
    fitted = fit_baselines(files.train.battles, recipe.grids, folds=recipe.folds, seed=recipe.seed, jobs=jobs, log=log)
    predictions = fitted.predict(files.test.battles)

    run.mkdir(parents=True, exist_ok=True)
    recipe.write(run / RECIPE)
    fitted.save(run / "model")
    log(f"wrote the {len(fitted.models)} models to {run / 'model'}")
    chosen, remarks = {}, {}
    for name, candidate in fitted.selected.items():
        weight, parameters = fitted.weights[name], candidate.parameters
        chosen[name] = {"weight": weight, "log_loss": candidate.log_loss, "parameters": parameters}
        remarks[name] = f"{weight:.0%} of the blend; {', '.join(f'{key} {value}' for key, value in parameters.items())}"
    (run / CHOSEN).write_text(json.dumps(chosen, indent=2) + "\n", encoding="utf-8")
    ids = [battle.id for battle in files.test.battles]
    write_submission(run / SUBMISSION, ids, predictions[BLEND], files.sample)
    log(f"wrote {run / SUBMISSION}")
    facts = {"main": BLEND, "model": str(run)}
    if answered is not None:
        scores = write_preferences(run / "eval" / TEST, answered, predictions, split="test", **facts)
        print(f"\n{answered.name}: {len(answered):,} rows, scored once\n{scores.table()}")
    # last: it marks the run as finished
    split = f"train, {recipe.folds} folds"
    scores = write_preferences(run / "eval" / HELD_OUT, files.train, fitted.held_out, split=split, **facts)
    print(f"\n{files.train.name}: each row by models that had not seen its prompt\n{scores.table(remarks)}")


def fit_baselines(
    battles: Sequence[Battle], grids: Grids, *, folds: int, seed: int, jobs: int = 1, log: Log = lambda line: None
) -> Baselines:
    """Select each model's parameters and the blend's weights by cross-validation over prompts, then fit on all rows.

    Grids come from `check_grids`; `jobs` is a number of processes, -1 for one per core, each on one core, and does not
    change the result. Threads would share Python's list of warning filters, which scikit-learn 1.9 replaces at times.
    """
    rows = battle_features(battles)
    labels = np.array([battle.label for battle in battles], np.int64)
    groups = np.array([battle.group() for battle in battles])
    log(f"computed {rows.given.shape[1]} features of {len(labels):,} rows")
    # all rows of a prompt are in the same fold
    splits = list(GroupKFold(folds, shuffle=True, random_state=seed).split(labels, groups=groups))
    selected = _search(rows, labels, groups, grids, splits, seed=seed, jobs=jobs, log=log)
    held_out = {name: candidate.held_out for name, candidate in selected.items()}
    weights = blend_weights(list(held_out.values()), labels)
    matrix = FeatureMatrix(seed).fit(rows)
    inputs = matrix.transform(rows)

    def fit(name: str) -> SwapAveraged:
        with threadpool_limits(1):
            return SwapAveraged(name, selected[name].parameters, seed).fit(*inputs, labels, groups)

    models: Any = Parallel(n_jobs=jobs)(delayed(fit)(name) for name in selected)
    log(f"fitted {len(models)} models on all rows")
    prior = np.empty((len(labels), 3))
    for train, test in splits:
        prior[test] = class_prior(labels[train])
    mixed = held_out_blend(list(held_out.values()), labels, splits)
    return Baselines(
        matrix=matrix,
        models=dict(zip(selected, models, strict=True)),
        selected=selected,
        weights=dict(zip(selected, weights.tolist(), strict=True)),
        prior=class_prior(labels),
        held_out={PRIOR: prior, **held_out, BLEND: mixed},
    )


def class_prior(labels: np.ndarray) -> np.ndarray:
    """Class frequencies with Laplace smoothing, the same for a and b: float64 [3]."""
    frequencies = (np.bincount(labels, minlength=3) + 1) / (len(labels) + 3)
    either = (frequencies[0] + frequencies[1]) / 2
    return np.array([either, either, frequencies[2]])


def _search(
    rows: BattleFeatures,
    labels: np.ndarray,
    groups: np.ndarray,
    grids: Grids,
    splits: Splits,
    *,
    seed: int,
    jobs: int,
    log: Log,
) -> dict[str, Candidate]:
    """Cross-validate every point of every grid: the best one of each model."""
    points = [(name, point) for name, grid in grids.items() for point in ParameterGrid(grid)]

    def run_fold(fold: int) -> tuple[int, list[np.ndarray]]:
        train, test = splits[fold]
        with threadpool_limits(1):
            matrix = FeatureMatrix(seed).fit(rows.subset(train))
            train_inputs, test_inputs = matrix.transform(rows.subset(train)), matrix.transform(rows.subset(test))
            models = (SwapAveraged(name, point, seed) for name, point in points)
            return fold, [m.fit(*train_inputs, labels[train], groups[train]).predict(*test_inputs) for m in models]

    held_out = np.empty((len(points), len(labels), 3))
    running: Any = Parallel(n_jobs=jobs, return_as="generator_unordered")
    folds = range(len(splits))
    for done, (fold, predictions) in enumerate(running(delayed(run_fold)(fold) for fold in folds), start=1):
        test = splits[fold][1]
        held_out[:, test] = predictions
        log(f"fold {done} of {len(splits)}: {len(points)} models, evaluated on {len(test):,} rows")
    selected: dict[str, Candidate] = {}
    for (name, point), predictions in zip(points, held_out, strict=True):
        log_loss = float(-np.log(predictions[np.arange(len(labels)), labels]).mean())
        if name not in selected or log_loss < selected[name].log_loss:
            selected[name] = Candidate(dict(point), predictions, log_loss)
    return selected


def _check_enough(battles: Battles, folds: int) -> None:
    """Refuse data with too few prompts or without one of the classes."""
    prompts = len({battle.group() for battle in battles.battles})
    if prompts < MIN_PROMPTS_PER_FOLD * folds:
        raise UserError(
            f"folds: {folds} folds need {MIN_PROMPTS_PER_FOLD * folds} different prompts, {battles.name} has {prompts}"
        )
    for name, count in zip(CLASSES, np.bincount(battles.labels, minlength=3), strict=True):
        if not count:
            raise UserError(f"{battles.name} has no row with {name}: a model needs rows of each class")


def _check_folder(run: Path, recipe: BaselinesRecipe) -> None:
    """Refuse a folder with other content, before any work is done."""
    if run.is_file():
        raise UserError(f"output_dir '{run}' is a file")
    if not run.is_dir() or not any(run.iterdir()):
        return
    earlier = or_empty(read_recipe_values, run)
    if earlier.get("method") != recipe.method:
        raise UserError(f"output_dir '{run}' is not empty and is not a run of baselines: choose another --output_dir")
    if BaselinesRecipe.from_layers([Layer(earlier)]).fingerprint() != recipe.fingerprint():
        raise UserError(f"output_dir '{run}' holds the run of another recipe: choose another --output_dir")
    if (run / "eval" / HELD_OUT / "metrics.json").is_file():
        raise AlreadyDone(f"output_dir '{run}' holds the finished run of this recipe: nothing is left to do")
