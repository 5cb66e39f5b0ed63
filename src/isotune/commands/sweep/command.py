"""`isotune sweep RECIPE --learning_rate 1e-5..1e-4 --trials 20 --seeds 3`: search, rank, and examine the winner."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from isotune.commands.sweep.flags import parser
from isotune.commands.sweep.plan import Plan, read_plan
from isotune.commands.sweep.space import Values
from isotune.io.errors import RunFault, UserError
from isotune.io.extras import need
from isotune.io.files import replace_file

if TYPE_CHECKING:
    from isotune.commands.sweep.ranking import Examined, Ranking

LOCK, RESULT = ".sweep.lock", "sweep.json"
USAGE = """isotune sweep RECIPE --KEY LOW..HIGH | A,B,C ... [--trials N] [--seeds N] [--KEY VALUE ...]

  RECIPE          a file, the name of a shipped one (`isotune ls`), or the folder of a run
  --KEY LOW..HIGH a key of the recipe between two numbers: --learning_rate 1e-5..1e-4
  --KEY A,B,C     a key of the recipe from a list: --warmup_steps 0,100
  --KEY VALUE     a key that all trials share

Trial 0 is the recipe as it is. The same command goes on where a stopped sweep was.
"""


def run(argv: Sequence[str]) -> None:
    """`isotune sweep ARGV`."""
    if not argv or {"-h", "--help"} & {*argv}:
        print(USAGE)
        print(parser().format_help().partition("\n\n")[2])
        if argv:
            return
    plan = read_plan(argv)
    need("optuna", "isotune sweep")
    plan.claim()
    try:
        with FileLock(plan.folder / LOCK, timeout=0):
            _sweep(plan)
    except Timeout:
        raise UserError(f"{plan.folder}: another sweep is at work there") from None


def _sweep(plan: Plan) -> None:
    from isotune.commands.sweep import ranking as found
    from isotune.commands.sweep import runs
    from isotune.commands.sweep.picture import draw_ranking
    from isotune.commands.sweep.study import Tried, search

    if plan.recipe.values.get("drop_leaked"):
        print("note        drop_leaked is about the rows to choose by: texts of the test rows may stand in training")
    trials: list[found.Trial] = []

    def try_values(number: int, values: Values) -> float | None:
        failure, scores = plan.contradiction(values) if number else None, list[float]()
        try:
            for seed in plan.seeds if failure is None else ():
                print(f"sweep       trial {number} of {plan.trials}, seed {seed}: {_said(values)}", flush=True)
                scores.append(runs.train(plan, number, values, seed))
        except runs.TrialFailed as error:
            failure, scores = str(error), []  # as values that the memory is too small for
        if failure is not None:
            print(f"sweep       trial {number} has failed: {failure}", flush=True)
        trials.append(found.Trial(number, values, tuple(scores), failure))
        return trials[-1].mean if scores else None

    score = try_values(0, plan.default)
    if score is None:
        raise RunFault(f"the recipe itself fails, and there is nothing to compare with: {trials[0].failure}")
    for seed in plan.seeds:  # a mistake in the test rows ends the sweep before hours of trials
        runs.examine(plan, 0, seed)
    searched = search(
        plan.folder,
        plan.axes,
        plan.trials,
        seed=plan.seeds[0],
        higher_is_better=plan.higher_is_better,
        default=Tried(plan.default, score),
        score=try_values,
    )
    tried = sum(1 for _ in searched)
    ranking = found.rank(plan, trials)
    print("\n" + "\n".join(found.table(ranking)), flush=True)
    examined = _examine(plan, ranking)
    sentence = found.verdict(ranking, examined)
    content = found.as_dict(plan, ranking, examined, sentence)
    replace_file(plan.folder / RESULT, json.dumps(content, indent=2) + "\n")
    picture = draw_ranking(ranking, plan.folder)
    if tried < plan.trials:
        print(f"note        {tried} of {plan.trials} trials: there are no more values to try")
    if examined.winners_so_far > 1:
        print(f"note        the test rows have judged {examined.winners_so_far} winners: they are no longer unseen")
    print(f"picture     {picture}\nresult      {plan.folder / RESULT}\n{sentence}")


def _examine(plan: Plan, ranking: "Ranking") -> "Examined":
    """The winner and the default on the test rows."""
    from isotune.commands.sweep import ranking as found
    from isotune.commands.sweep import runs

    numbers = list(dict.fromkeys((ranking.winner.number, 0)))
    print(f"sweep       the winner, {ranking.winner.name}, on {plan.test.in_words}", flush=True)
    results = {number: [runs.examine(plan, number, seed) for seed in plan.seeds] for number in numbers}
    first = results[ranking.winner.number][0]
    common = set.intersection(*({*one.metrics} for own in results.values() for one in own))
    metric = found.metric_in_result(plan.metric, common)
    if metric is None:
        raise UserError(f"{first.folder} has no {plan.metric.removeprefix('eval_')}: it is undefined on the test rows")
    values = {number: tuple(one.metrics[metric] for one in own) for number, own in results.items()}
    winner, default = values[ranking.winner.number], values[0]
    return found.Examined(
        metric=metric,
        rows=plan.test.in_words,
        count=len(first.predictions),
        winner=winner,
        default=default,
        difference=found.compare_seeds(default, winner) if ranking.winner.number else None,
        winners_so_far=len([number for number in runs.tested_trials(plan) if number]),
    )


def _said(values: Values) -> str:
    shown = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in values.items()}
    return ", ".join(f"{key} {value}" for key, value in shown.items())
