"""`isotune sweep RECIPE --learning_rate 1e-5..1e-4 --trials 20 --seeds 3`: search, rank, and examine the winner."""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from isotune.commands.sweep.flags import parser
from isotune.commands.sweep.jobs import Jobs
from isotune.commands.sweep.plan import Plan, read_plan
from isotune.commands.sweep.processes import Processes, shares_of
from isotune.commands.sweep.space import Values
from isotune.io.errors import RunFault, UserError
from isotune.io.extras import need
from isotune.io.files import replace_file

if TYPE_CHECKING:
    from isotune.commands.sweep.ranking import Examined, Ranking
    from isotune.commands.sweep.runs import Machine

LOCK, RESULT = ".sweep.lock", "sweep.json"
USAGE = """isotune sweep RECIPE --KEY LOW..HIGH | A,B,C ... [--trials N] [--seeds N] [--KEY VALUE ...]

  RECIPE          a file, the name of a shipped one (`isotune ls`), or the folder of a run
  --KEY LOW..HIGH a key of the recipe between two numbers: --learning_rate 1e-5..1e-4
  --KEY A,B,C     a key of the recipe from a list: --warmup_steps 0,100
  --KEY VALUE     a key that all trials share
  --help-all      after a RECIPE: all of its keys

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
    machine = _machine(plan)
    plan.claim()
    try:
        with FileLock(plan.folder / LOCK, timeout=0):
            _sweep(plan, machine)
    except Timeout:
        raise UserError(f"{plan.folder}: another sweep is at work there") from None


def _sweep(plan: Plan, machine: "Machine") -> None:
    from isotune.commands.sweep import pruning, runs
    from isotune.commands.sweep import ranking as found
    from isotune.commands.sweep.picture import draw_ranking
    from isotune.commands.sweep.study import Score, Search, Tried
    from isotune.commands.sweep.study import search as try_values

    if plan.recipe.values.get("drop_leaked"):
        print("note        drop_leaked is about the rows to choose by: texts of the test rows may stand in training")
    trials = runs.train(plan, machine, {0: plan.default})
    if (failure := trials[0].failure) is not None:
        raise RunFault(f"the recipe itself fails, and there is nothing to compare with: {failure}")
    runs.examine(plan, machine, [0])  # a mistake in the test rows ends the sweep before hours of trials

    def score(generation: Mapping[int, Values]) -> list[Score]:
        trained = (pruning.train if plan.pruning else runs.train)(plan, machine, generation)
        trials.extend(trained)
        return [trial.score for trial in trained]

    search = Search(plan.axes, plan.trials, plan.seeds[0], plan.higher_is_better, plan.parallel)
    tried = sum(1 for _ in try_values(plan.folder, search, Tried(plan.default, trials[0].mean), score))
    ranking = found.rank(plan, trials)
    print("\n" + "\n".join(found.table(ranking)), flush=True)
    examined = _examine(plan, machine, ranking)
    sentence = found.verdict(ranking, examined)
    content = found.as_dict(plan, ranking, examined, sentence)
    replace_file(plan.folder / RESULT, json.dumps(content, indent=2) + "\n")
    picture = draw_ranking(ranking, plan.folder)
    if tried < plan.trials:
        print(f"note        {tried} of {plan.trials} trials: there are no more values to try")
    if examined.winners_so_far > 1:
        print(f"note        the test rows have judged {examined.winners_so_far} winners: they are no longer unseen")
    print(f"picture     {picture}\nresult      {plan.folder / RESULT}\n{sentence}")


def _machine(plan: Plan) -> "Machine":
    """What runs the trials; UserError where it is not to be had."""
    if plan.jobs is None:
        return Processes(shares_of(plan.parallel, plan.launch), plan.launch)
    return Jobs(plan.folder, plan.logs, plan.jobs)


def _examine(plan: Plan, machine: "Machine", ranking: "Ranking") -> "Examined":
    """The winner and the default on the test rows."""
    from isotune.commands.sweep import ranking as found
    from isotune.commands.sweep import runs

    numbers = list(dict.fromkeys((ranking.winner.number, 0)))
    results = runs.examine(plan, machine, numbers)
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
