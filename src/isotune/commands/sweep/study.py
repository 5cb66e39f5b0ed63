"""The study: which values are tried next. Optuna's sampler over a journal on the run's disk.

Each proposal is drawn with a seed of its own, from the recipe's seed and its number, and depends on nothing else than
the trials before it. So a sweep that was killed proposes what the whole one would have proposed.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from isotune.commands.sweep.space import Axis, Values, grid
from isotune.io.errors import UserError, first_line

JOURNAL, NAME = "journal.log", "sweep"
MOST_REPEATS = 100  # proposals in a row that have been tried: nothing new is to be expected

# the score of a trial's values, given its number from 1; None where it failed
Score = Callable[[int, Values], float | None]


@dataclass(frozen=True)
class Tried:
    """Values of the searched keys with their score, which is None where the trial failed."""

    values: Values
    score: float | None


def search(
    folder: Path, axes: list[Axis], trials: int, *, seed: int, higher_is_better: bool, default: Tried, score: Score
) -> Iterator[Tried]:
    """Try so many values beside the default's, and yield each with its score once the study knows it.

    Trials of an earlier call are scored again, which costs nothing where their runs have finished. A proposal that was
    tried before is told its score and is no trial. Fewer trials come where there are no more values. UserError: the
    journal cannot be read.
    """
    from optuna.trial import TrialState

    study = _open(folder / JOURNAL, higher_is_better)
    distributions = {axis.key: axis.distribution() for axis in axes}
    whole = grid(axes, trials + 1)
    for values in whole or ():
        study.enqueue_trial(values, skip_if_exists=True)
    scores = {_name(default.values): default.score}
    number = repeats = 0
    while len(scores) <= trials and repeats < MOST_REPEATS:
        known = study.get_trials(deepcopy=False)
        if number == len(known) and whole is not None:
            return
        if number == len(known) or known[number].state == TrialState.WAITING:
            values, is_open = _propose(study, distributions, _seed(seed, number)), True
        else:
            values, is_open = known[number].params, known[number].state == TrialState.RUNNING
        if values.keys() != distributions.keys():  # killed while it was drawn
            if is_open:
                study.tell(number, state=TrialState.FAIL)
            number += 1
            continue
        name = _name(values)
        is_new = name not in scores
        if is_new:
            scores[name] = score(len(scores), values)
        if is_open:
            told = scores[name]
            study.tell(number, told, TrialState.FAIL if told is None else TrialState.COMPLETE)
        number, repeats = number + 1, 0 if is_new else repeats + 1
        if is_new:
            yield Tried(values, scores[name])


def _open(journal: Path, higher_is_better: bool) -> Any:
    import optuna
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        return optuna.create_study(
            storage=optuna.storages.JournalStorage(JournalFileBackend(str(journal))),
            study_name=NAME,
            direction="maximize" if higher_is_better else "minimize",
            load_if_exists=True,
        )
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{journal} is no journal of a sweep ({first_line(error)})") from error


def _propose(study: Any, distributions: Values, seed: int) -> Values:
    import optuna

    study.sampler = optuna.samplers.TPESampler(seed=seed)
    return study.ask(distributions).params


def _name(values: Values) -> str:
    return repr(sorted((key, float(v) if type(v) in (int, float) else v) for key, v in values.items()))


def _seed(seed: int, number: int) -> int:
    return int(np.random.SeedSequence((seed, number)).generate_state(1)[0])
