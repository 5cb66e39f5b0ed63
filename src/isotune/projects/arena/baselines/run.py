"""A run of the baselines: checks, training, predictions and the files in the run folder."""

import json
import time
from pathlib import Path

import numpy as np
import yaml

from isotune.config.layers import Layer
from isotune.io.errors import AlreadyDone, UserError
from isotune.projects.arena.baselines.estimators import check_grids
from isotune.projects.arena.baselines.fit import BLEND, fit_baselines
from isotune.projects.arena.battles import CLASSES, Battles, read_competition
from isotune.projects.arena.preference import read_answers, write_preferences
from isotune.projects.arena.recipes import BaselinesRecipe
from isotune.projects.arena.submission import write_submission

RECIPE, SUBMISSION, CHOSEN = "recipe.yaml", "submission.csv", "chosen.json"
MIN_PROMPTS_PER_FOLD = 3  # for the calibration inside a fold
MIN_PARALLEL_ROWS = 500  # each process takes seconds to import its libraries
HELD_OUT, TEST = "arena", "arena_test"


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
    chosen, remarks = {}, {}
    for name, candidate in fitted.selected.items():
        weight, parameters = fitted.weights[name], candidate.parameters
        chosen[name] = {"weight": weight, "log_loss": candidate.log_loss, "parameters": parameters}
        remarks[name] = f"{weight:.0%} of the blend; {', '.join(f'{key} {value}' for key, value in parameters.items())}"
    (run / CHOSEN).write_text(json.dumps(chosen, indent=2) + "\n", encoding="utf-8")
    ids = [battle.id for battle in files.test.battles]
    write_submission(run / SUBMISSION, ids, predictions[BLEND], files.sample)
    log(f"wrote {run / SUBMISSION}")
    if answered is not None:
        facts = {"main": BLEND, "model": str(run), "split": "test"}
        scores = write_preferences(run / "eval" / TEST, answered, predictions, **facts)
        print(f"\n{answered.name}: {len(answered):,} rows, scored once\n{scores.table()}")
    # last: it marks the run as finished
    facts = {"main": BLEND, "model": str(run), "split": f"train, {recipe.folds} folds"}
    scores = write_preferences(run / "eval" / HELD_OUT, files.train, fitted.held_out, **facts)
    print(f"\n{files.train.name}: each row by models that had not seen its prompt\n{scores.table(remarks)}")


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
    try:
        earlier = yaml.safe_load((run / RECIPE).read_text(encoding="utf-8"))
        is_baselines = isinstance(earlier, dict) and earlier.get("method") == recipe.method
    except (OSError, yaml.YAMLError):
        is_baselines, earlier = False, {}
    if not is_baselines:
        raise UserError(f"output_dir '{run}' is not empty and is not a run of baselines: choose another --output_dir")
    if BaselinesRecipe.from_layers([Layer(earlier)]).fingerprint() != recipe.fingerprint():
        raise UserError(f"output_dir '{run}' holds the run of another recipe: choose another --output_dir")
    if (run / "eval" / HELD_OUT / "metrics.json").is_file():
        raise AlreadyDone(f"output_dir '{run}' holds the finished run of this recipe: nothing is left to do")
