"""Successive halving: at an evaluation the worse half of a generation's trials ends, and the others go on.

All first runs of a generation come to their evaluation 1 and pause; the better half goes on to evaluation 2, of those
the better half to 4, and so on. Nothing depends on which of them is faster, and what was decided can be read in the
runs' metrics at any later time.
"""

import math
from collections.abc import Mapping

from isotune.commands.sweep import runs
from isotune.commands.sweep.plan import Plan
from isotune.commands.sweep.ranking import Trial
from isotune.commands.sweep.space import Values
from isotune.commands.sweep.study import Pruned


def train(plan: Plan, machine: runs.Machine, values: Mapping[int, Values]) -> list[Trial]:
    """As `runs.train`, for the trials that are left; the others are pruned."""
    alive, number = dict(values), 1
    ended: dict[int, Trial] = {}
    while len(alive) > 1:
        for trial, failure in runs.train_runs(plan, machine, alive, plan.seeds[:1], number).items():
            ended[trial] = runs.failed(trial, alive.pop(trial), failure)
        evaluations = {trial: runs.evaluation_of(plan, trial, number) for trial in alive}
        if all(one.is_last for one in evaluations.values()):
            break
        for trial in _worse_half(plan, evaluations):
            pruned = Pruned(evaluations[trial].step, evaluations[trial].value)
            ended[trial] = Trial(trial, alive.pop(trial), pruned=pruned)
            print(f"sweep       trial {trial} is pruned at step {pruned.step}", flush=True)
        number *= 2
    ended |= {trial.number: trial for trial in runs.train(plan, machine, alive)}
    return [ended[trial] for trial in values]


def _worse_half(plan: Plan, evaluations: Mapping[int, runs.Evaluation]) -> list[int]:
    """The trials that end; of equal ones the earlier goes on, and the better half is the larger of unequal ones."""

    def place(trial: int) -> tuple[float, int]:
        value = evaluations[trial].value
        if value is None:
            return math.inf, trial
        return (-value if plan.higher_is_better else value), trial

    return sorted(evaluations, key=place)[math.ceil(len(evaluations) / 2) :]
