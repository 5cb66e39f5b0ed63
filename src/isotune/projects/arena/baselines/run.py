"""A run of the baselines: its folder, and the files that it leaves there."""

import json
import time
from pathlib import Path

import numpy as np
import yaml

from isotune.config.layers import Layer
from isotune.io.errors import AlreadyDone, UserError
from isotune.projects.arena.baselines.estimators import check_grids
from isotune.projects.arena.baselines.preference import BLEND, Baselines, fit_baselines
from isotune.projects.arena.battles import CLASSES, Battles, Competition, read_competition
from isotune.projects.arena.preference import read_answers, score_preferences, write_preferences
from isotune.projects.arena.recipes import BaselinesRecipe
from isotune.projects.arena.submission import write_submission

RECIPE, SUBMISSION, CHOSEN = "recipe.yaml", "submission.csv", "chosen.json"
PROMPTS_A_FOLD = 3  # what calibration inside a fold needs
ROWS_WORTH_A_PROCESS = 500  # each process takes seconds to import what it needs
HELD_OUT, TEST = "arena", "arena_test"


def run_baselines(recipe: BaselinesRecipe) -> None:
    """Read, choose, fit, predict; leaves recipe.yaml, chosen.json, submission.csv and eval/ in the run's folder.

    Raises:
        UserError: the recipe, the data or the folder is not as it should be; nothing is written then.
        AlreadyDone: the folder holds this very run.
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

    def say(line: str) -> None:
        print(f"{time.perf_counter() - started:6.0f} s  {line}", flush=True)

    assert recipe.grids is not None
    jobs = -1 if len(files.train) > ROWS_WORTH_A_PROCESS else 1
    fitted = fit_baselines(files.train.battles, recipe.grids, folds=recipe.folds, seed=recipe.seed, jobs=jobs, say=say)
    predictions = fitted.predict(files.test.battles)

    run.mkdir(parents=True, exist_ok=True)
    recipe.write(run / RECIPE)
    (run / CHOSEN).write_text(json.dumps(_chosen(fitted), indent=2) + "\n", encoding="utf-8")
    ids = [battle.id for battle in files.test.battles]
    write_submission(run / SUBMISSION, ids, predictions[BLEND], files.sample)
    say(f"wrote {run / SUBMISSION}")
    if answered is not None:
        scores = score_preferences(answered, predictions, main=BLEND)
        write_preferences(run / "eval" / TEST, answered, predictions, scores, model=str(run), split="test")
        print(f"\n{answered.name}: {len(answered):,} rows, scored once\n{scores.table()}")
    _write_held_out(run, recipe, files, fitted)  # last: it stands for a finished run


def _write_held_out(run: Path, recipe: BaselinesRecipe, files: Competition, fitted: Baselines) -> None:
    scores = score_preferences(files.train, fitted.held_out, main=BLEND)
    split = f"train, {recipe.folds} folds"
    write_preferences(run / "eval" / HELD_OUT, files.train, fitted.held_out, scores, model=str(run), split=split)
    remarks = {
        name: f"{fitted.weights[name]:.0%} of the blend; {', '.join(f'{k} {v}' for k, v in one.parameters.items())}"
        for name, one in fitted.chosen.items()
    }
    print(f"\n{files.train.name}: each row by models that had not seen its prompt\n{scores.table(remarks)}")


def _chosen(fitted: Baselines) -> dict[str, dict]:
    return {
        name: {"weight": fitted.weights[name], "log_loss": one.log_loss, "parameters": one.parameters}
        for name, one in fitted.chosen.items()
    }


def _check_enough(battles: Battles, folds: int) -> None:
    """Refuse rows from which nothing can be learned or judged."""
    prompts = len({battle.group() for battle in battles.battles})
    if prompts < PROMPTS_A_FOLD * folds:
        raise UserError(
            f"folds: {folds} folds need {PROMPTS_A_FOLD * folds} different prompts, {battles.name} has {prompts}"
        )
    for name, count in zip(CLASSES, np.bincount(battles.labels, minlength=3), strict=True):
        if not count:
            raise UserError(f"{battles.name} has no row with {name}: there is nothing to tell apart")


def _check_folder(run: Path, recipe: BaselinesRecipe) -> None:
    """Refuse a folder that holds something else, before any work is done."""
    if run.is_file():
        raise UserError(f"output_dir '{run}' is a file")
    if not run.is_dir() or not any(run.iterdir()):
        return
    try:
        earlier = yaml.safe_load((run / RECIPE).read_text(encoding="utf-8"))
        mine = isinstance(earlier, dict) and earlier.get("method") == recipe.method
    except (OSError, yaml.YAMLError):
        mine, earlier = False, {}
    if not mine:
        raise UserError(f"output_dir '{run}' is not empty and holds no run of baselines: choose another --output_dir")
    if BaselinesRecipe.from_layers([Layer(earlier)]).fingerprint() != recipe.fingerprint():
        raise UserError(f"output_dir '{run}' holds the run of another recipe: choose another --output_dir")
    if (run / "eval" / HELD_OUT / "metrics.json").is_file():
        raise AlreadyDone(f"output_dir '{run}' holds the finished run of this recipe: nothing is left to do")
