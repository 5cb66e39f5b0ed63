"""`isotune sweep --pruning`: which trials end at which evaluation, with made-up runs and no training."""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from tests.launching import TINY_CLASSIFIER

from isotune.commands import start
from isotune.commands.sweep import pruning
from isotune.commands.sweep.plan import Plan, read_plan
from isotune.commands.sweep.ranking import Trial, rank, table
from isotune.commands.sweep.space import Axis
from isotune.commands.sweep.study import Pruned, Search, Tried, search
from isotune.io.variables import PAUSE

STEPS = 10  # between evaluations
# the accuracy of each trial at each of six evaluations; the third is the best at first, and the seventh has none then
CURVES = {
    1: (0.30, 0.50, 0.55, 0.60, 0.65, 0.70),
    2: (0.20, 0.30, 0.30, 0.30, 0.30, 0.30),
    3: (0.60, 0.40, 0.40, 0.40, 0.40, 0.40),
    4: (0.50, 0.55, 0.57, 0.58, 0.59, 0.60),
    5: (0.30, 0.90, 0.90, 0.90, 0.90, 0.90),  # equal to the first at its evaluation 1, and later
    6: (0.25, 0.25, 0.25, 0.25, 0.25, 0.25),
    7: (None, 0.99, 0.99, 0.99, 0.99, 0.99),
}
VALUES = {number: {"learning_rate": number * 1e-5} for number in CURVES}


class Killed(Exception):
    """What ends the sweep."""


class Curves:
    """A machine whose runs have these metrics; it dies instead of the run after `left`, which has gone half way."""

    def __init__(self, curves: Mapping[int, tuple], left: int = 10**6) -> None:
        self.curves, self.left = curves, left
        self.began: list[tuple[str, str, int]] = []  # trial, seed, evaluation at which it is to pause

    def wait_for(self, run: Path) -> None:
        """Nothing is at work."""

    def run(self, commands):
        while commands:
            command = commands.popleft()
            self.began.append((command.folder.parts[-2], command.folder.name, int(command.variables.get(PAUSE, 0))))
            self.left -= 1
            curve, until = self.curves[command.trial], int(command.variables.get(PAUSE, 10**6))
            paused = until < len(curve)
            if self.left < 0:
                write(command.folder, curve, min(until, len(curve)), "running")  # killed before it could say more
                raise Killed
            write(command.folder, curve, min(until, len(curve)), "paused" if paused else "finished")
            yield command, start.Ended(0)


def write(run: Path, curve: tuple, evaluations: int, status: str) -> None:
    """A run that has come to so many evaluations."""
    run.mkdir(parents=True, exist_ok=True)
    lines = [
        {"step": STEPS * number, "eval_loss": 1.0, "eval_accuracy": value}
        for number, value in enumerate(curve[:evaluations], start=1)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "status.json").write_text(json.dumps({"status": status}))


@pytest.fixture
def plan(tmp_path, monkeypatch) -> Plan:
    """Of two seeds and trials seven at a time."""
    monkeypatch.setattr(start, "gpu_names", lambda *_: [])
    file = tmp_path / "mine.yaml"
    values = {**TINY_CLASSIFIER, "task": "classification", "metric_for_best_model": "eval_accuracy"}
    file.write_text(yaml.safe_dump({**values, "output_dir": str(tmp_path / "run")}))
    words = ["--learning_rate", "1e-5..1e-4", "--seeds", "2", "--parallel", "7", "--pruning"]
    return read_plan([str(file), *words])


def test_at_each_evaluation_the_worse_half_ends_and_the_last_one_has_all_seeds(plan):
    machine = Curves(CURVES)
    trials = {trial.number: trial for trial in pruning.train(plan, machine, VALUES)}
    # evaluation 1: 3, 4, 1 and 5 of seven go on; evaluation 2: 5 and 4; evaluation 4: 5
    assert {number: trial.pruned for number, trial in trials.items()} == {
        1: Pruned(20, 0.5), 2: Pruned(10, 0.2), 3: Pruned(20, 0.4), 4: Pruned(40, 0.58), 5: None,
        6: Pruned(10, 0.25), 7: Pruned(10, None),
    }  # fmt: skip
    assert trials[5].scores == (0.9, 0.9) and all(trials[n].scores == () for n in trials if n != 5)
    assert [one for one in machine.began if one[2] == 4] == [("trial-004", "seed-42", 4), ("trial-005", "seed-42", 4)]
    assert machine.began[-2:] == [("trial-005", "seed-42", 0), ("trial-005", "seed-43", 0)]
    again = Curves(CURVES)
    assert pruning.train(plan, again, VALUES) == list(trials.values()) and again.began == []


@pytest.mark.parametrize("left", [3, 8, 12, 14])  # within evaluation 1, 2, 4, and behind it
def test_a_sweep_that_is_killed_ends_as_the_whole_one(plan, tmp_path, left):
    whole = pruning.train(plan, machine := Curves(CURVES), VALUES)
    assert len(machine.began) == 15
    broken = replace(plan, folder=tmp_path / "broken")
    with pytest.raises(Killed):
        pruning.train(broken, Curves(CURVES, left), VALUES)
    assert pruning.train(broken, Curves(CURVES), VALUES) == whole


def test_runs_that_are_over_are_not_pruned(plan):
    one_evaluation = {number: curve[-1:] for number, curve in CURVES.items()}
    trials = pruning.train(plan, Curves(one_evaluation), VALUES)
    assert all(trial.pruned is None and len(trial.scores) == 2 for trial in trials)
    assert pruning.train(plan, Curves({}), {1: VALUES[1]})[0].scores == (0.7, 0.7), "one alone is compared with none"


def test_pruned_trials_are_ranked_below_finished_ones_and_compared_with_nothing(plan):
    values = {"learning_rate": 1e-5}
    trials = [
        Trial(0, values, (0.5, 0.6)), Trial(1, values, pruned=Pruned(20, 0.9)), Trial(2, values, (0.4, 0.3)),
        Trial(3, values, failure="diverged"), Trial(4, values, pruned=Pruned(40, 0.1)),
        Trial(5, values, pruned=Pruned(20, 0.95)), Trial(6, values, pruned=Pruned(20, None)),
    ]  # fmt: skip
    ranking = rank(plan, trials)
    assert [trial.number for trial in ranking.trials] == [0, 2, 4, 5, 1, 6, 3]
    compared = {trial.number: trial.against_default for trial in ranking.trials}
    assert [number for number, one in compared.items() if one] == [2]
    alone = rank(plan, [trials[0], trials[2]])
    assert ranking.trials[1].p_holm == alone.trials[1].p_holm
    lines = table(ranking)
    assert "0.1000" in lines[3] and "pruned at step 40" in lines[3] and "failed" in lines[7]


def test_the_search_learns_from_pruned_trials(tmp_path):
    def searched(folder: str, value: float) -> list[float]:
        def score(generation):
            return [Pruned(10, value) if values["weight_decay"] > 0.5 else -1.0 for values in generation.values()]

        (tmp_path / folder).mkdir()
        what = Search([Axis("weight_decay", low=0.0, high=1.0)], 40, seed=1, higher_is_better=True, parallel=4)
        found = search(tmp_path / folder, what, Tried({"weight_decay": 0.0}, -1.0), score)
        return [one.values["weight_decay"] for one in found]

    values = searched("pruned", -5.0)
    assert sum(value > 0.5 for value in values[12:]) < sum(value <= 0.5 for value in values[12:])
    assert not any(math.isnan(value) for value in searched("undefined", math.nan))
