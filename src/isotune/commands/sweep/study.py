"""The study: which values are tried next. Optuna's sampler, and its journal on the run's disk.

Trials are proposed in generations of `parallel`. Each proposal is drawn with a seed of its own, from the recipe's seed
and its number, and depends on nothing else than the trials of earlier generations and the proposals before it. So it
does not depend on which run ends first, and a sweep that was killed proposes what the whole one would have proposed.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from isotune.commands.sweep.space import Axis, Values, grid
from isotune.io.errors import UserError, first_line

JOURNAL, NAME = "journal.log", "sweep"
MOST_REPEATS = 100  # proposals in a row that have been tried: nothing new is to be expected


@dataclass(frozen=True)
class Pruned:
    """Where a trial ended that was not among the better ones; `value` of the metric there, None where undefined."""

    step: int
    value: float | None


Score = float | Pruned | None  # None of a trial that failed
# the scores of a generation, given the values of each by its number from 1
Scoring = Callable[[Mapping[int, Values]], Sequence[Score]]


@dataclass(frozen=True)
class Tried:
    """Values of the searched keys with their score."""

    values: Values
    score: Score


@dataclass(frozen=True)
class Search:
    """What is searched and how; `seed` is that of all proposals."""

    axes: list[Axis]
    trials: int
    seed: int
    higher_is_better: bool
    parallel: int = 1

    @property
    def distributions(self) -> dict[str, Any]:
        """Optuna's, by key."""
        return {axis.key: axis.distribution() for axis in self.axes}


def search(folder: Path, what: Search, default: Tried, score: Scoring) -> Iterator[Tried]:
    """Try so many values beside the default's, and yield each with its score once the study knows it.

    Trials of an earlier call are scored again, which costs nothing where their runs have finished. A proposal that was
    tried before is no trial. Fewer trials come where there are no more values. UserError: the journal cannot be read.
    """
    journal = _Journal(folder / JOURNAL, what)
    scores = {_name(default.values): default.score}  # of the generations that are over
    while len(scores) <= what.trials:
        first = len(scores)
        generation = journal.next_generation(scores, min(what.parallel, what.trials + 1 - first))
        if not generation:
            return
        found = score(dict(enumerate(generation.values(), start=first)))
        scores |= dict(zip(generation, found, strict=True))
        journal.tell(scores)
        yield from (Tried(values, scores[name]) for name, values in generation.items())


class _Journal:
    """The proposals so far, on the disk."""

    def __init__(self, file: Path, what: Search) -> None:
        self.what, self.distributions = what, what.distributions
        self.grid = grid(what.axes, what.trials + 1)  # every combination, where they are few
        self._study = _open(file, higher_is_better=what.higher_is_better)
        self._known = [trial.params for trial in self._study.get_trials(deepcopy=False)]
        self._proposals: list[Values] = []  # the part of those that this call has come to
        self._repeats = 0

    def next_generation(self, scores: Mapping[str, Score], most: int) -> dict[str, Values]:
        """The next values that were not tried, by name; fewer than `most` where there are no more."""
        generation: dict[str, Values] = {}
        while len(generation) < most and self._repeats < MOST_REPEATS:
            if len(self._proposals) == len(self._known):
                values = self._propose(scores) if self.grid is None else self._of_grid(scores, generation)
                if values is None:
                    break
                self._add(values)
            values = self._known[len(self._proposals)]
            self._proposals.append(values)
            if values.keys() != self.distributions.keys():  # killed by an earlier version while it was drawn
                continue
            is_new = (name := _name(values)) not in scores and name not in generation
            self._repeats = 0 if is_new else self._repeats + 1
            if is_new:
                generation[name] = values
        return generation

    def tell(self, scores: Mapping[str, Score]) -> None:
        """Write down the scores of the proposals so far that are open."""
        from optuna.trial import TrialState

        for trial in self._study.get_trials(deepcopy=False)[: len(self._proposals)]:
            if trial.state == TrialState.RUNNING:
                told = scores.get(_name(trial.params))
                self._study.tell(trial.number, told if isinstance(told, float) else None, _state(told))

    def _of_grid(self, scores: Mapping[str, Score], generation: Mapping[str, Values]) -> Values | None:
        tried = {*scores, *generation}
        return next((values for values in self.grid or () if _name(values) not in tried), None)

    def _propose(self, scores: Mapping[str, Score]) -> Values:
        """A draw that knows the scores of earlier generations, and that the other proposals are being tried."""
        import optuna
        from optuna.trial import TrialState, create_trial

        number = len(self._proposals)
        sampler = optuna.samplers.TPESampler(seed=_seed(self.what.seed, number), constant_liar=True)
        study = optuna.create_study(direction=_direction(higher_is_better=self.what.higher_is_better), sampler=sampler)
        for values in self._proposals:
            if values.keys() != self.distributions.keys():
                continue
            name = _name(values)
            score = scores.get(name)
            state = _state(score) if name in scores else TrialState.RUNNING
            steps: dict[int, float] = {}
            if isinstance(score, Pruned):
                steps[score.step] = math.nan if score.value is None else score.value
            value = score if isinstance(score, float) else None
            known = create_trial(
                state=state,
                value=value,
                params=values,
                distributions=self.distributions,
                intermediate_values=steps,
            )
            study.add_trial(known)
        return study.ask(self.distributions).params

    def _add(self, values: Values) -> None:
        from optuna.trial import TrialState, create_trial

        state = TrialState.RUNNING
        self._study.add_trial(create_trial(state=state, params=values, distributions=self.distributions))
        self._known.append(values)


def _open(journal: Path, *, higher_is_better: bool) -> Any:
    import optuna
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        return optuna.create_study(
            storage=optuna.storages.JournalStorage(JournalFileBackend(str(journal))),
            study_name=NAME,
            direction=_direction(higher_is_better=higher_is_better),
            load_if_exists=True,
        )
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{journal} is no journal of a sweep ({first_line(error)})") from error


def _state(score: Score) -> Any:
    """As Optuna has it."""
    from optuna.trial import TrialState

    if score is None:
        return TrialState.FAIL
    return TrialState.PRUNED if isinstance(score, Pruned) else TrialState.COMPLETE


def _direction(*, higher_is_better: bool) -> Literal["maximize", "minimize"]:
    return "maximize" if higher_is_better else "minimize"


def _name(values: Values) -> str:
    return repr(sorted((key, float(v) if type(v) in (int, float) else v) for key, v in values.items()))


def _seed(seed: int, number: int) -> int:
    return int(np.random.SeedSequence((seed, number)).generate_state(1)[0])
