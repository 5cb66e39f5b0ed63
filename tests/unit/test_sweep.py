"""`isotune sweep`: what is searched, in which order, and what its figures say, with made-up results and no training."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import optuna
import pytest
import yaml
from scipy.stats import binomtest
from scipy.stats import t as student
from statsmodels.stats.multitest import multipletests
from tests.launching import TINY, TINY_CLASSIFIER

from isotune.cli import main
from isotune.commands import start
from isotune.commands.sweep import command, runs
from isotune.commands.sweep.picture import draw_ranking
from isotune.commands.sweep.plan import read_plan
from isotune.commands.sweep.processes import Command
from isotune.commands.sweep.ranking import Examined, Trial, metric_in_result, rank, table, verdict
from isotune.commands.sweep.space import Axis, grid
from isotune.commands.sweep.study import Pruned, Search, Tried, search
from isotune.evaluation.statistics.seeds import compare_seeds
from isotune.io.errors import MEMORY, VALUES, Preempted, UserError

RATES = Axis("learning_rate", low=1e-5, high=1e-3, log=True)
WARMUP = Axis("warmup_steps", choices=(0, 100))


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    """The tests themselves may run under one."""
    for name in ("LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(start, "gpu_names", lambda *_: [])


@pytest.fixture
def recipe(tmp_path) -> str:
    """A recipe's file, whose evaluation data are the split test of its own data set."""
    return write(tmp_path, {**TINY_CLASSIFIER, "task": "classification", "metric_for_best_model": "eval_accuracy"})


class Scripted:
    """A machine on which commands end in these ways, one after the other, and then well."""

    def __init__(self, *ended: start.Ended) -> None:
        self.ended, self.commands = list(ended), list[Command]()

    def wait_for(self, run: Path) -> None:
        """Nothing is at work."""

    def run(self, commands):
        while commands:
            self.commands.append(commands.popleft())
            yield self.commands[-1], self.ended.pop(0) if self.ended else start.Ended(0)


def write(folder: Path, values: dict) -> str:
    file = folder / "mine.yaml"
    file.write_text(yaml.safe_dump({"output_dir": str(folder / "run"), **values}))
    return str(file)


def axes_of(recipe: str, *flags: str) -> dict[str, Axis]:
    return {axis.key: axis for axis in read_plan([recipe, *flags]).axes}


class TestSearchedKeys:
    """Ranges, lists, and what is neither."""

    @pytest.mark.parametrize(
        ("flag", "axis"),
        [
            ("--learning_rate 1e-5..3e-5", Axis("learning_rate", low=1e-5, high=3e-5, log=True)),
            ("--learning_rate 0..1e-4", Axis("learning_rate", low=0.0, high=1e-4)),
            ("--weight_decay 0..0.1", Axis("weight_decay", low=0.0, high=0.1)),
            ("--weight_decay 0.01..0.09", Axis("weight_decay", low=0.01, high=0.09)),
            ("--weight-decay 0.01..0.1", Axis("weight_decay", low=0.01, high=0.1, log=True)),
            ("--global_batch_size 8..79", Axis("global_batch_size", low=8, high=79)),
            ("--global_batch_size 8..80", Axis("global_batch_size", low=8, high=80, log=True)),
            ("--warmup_steps 0..100", Axis("warmup_steps", low=0, high=100)),
            ("--warmup_steps 0..0.1", Axis("warmup_steps", low=0.0, high=0.1)),
            ("--warmup_steps 0,0.1,50", Axis("warmup_steps", choices=(0, 0.1, 50))),
            ("--lr_scheduler_type linear,cosine", Axis("lr_scheduler_type", choices=("linear", "cosine"))),
            ("--full_determinism true,false", Axis("full_determinism", choices=(True, False))),
        ],
    )
    def test_a_range_and_a_list_are_read_as_their_key_takes_them(self, recipe, flag, axis):
        found = axes_of(recipe, *flag.split())[axis.key]
        assert found == axis
        types = [type(value) for value in (*found.choices, found.low, found.high)]
        assert types == [type(value) for value in (*axis.choices, axis.low, axis.high)]

    def test_other_flags_are_shared_by_all_trials_and_the_default_is_the_recipe_with_them(self, recipe):
        plan = read_plan([recipe, "--max_steps", "9", "--learning_rate", "1e-5..1e-4", "--seed", "7", "--seeds", "2"])
        assert (plan.recipe.max_steps, plan.seeds, plan.trials) == (9, [7, 8], 20)
        assert plan.default == {"learning_rate": TINY_CLASSIFIER["learning_rate"]}
        assert plan.folder == Path(f"{Path(recipe).parent}/run_sweep")

    @pytest.mark.parametrize(
        ("flags", "says"),
        [
            ("--learnin_rate 1e-5..1e-4", "--learnin_rate is not a key: did you mean --learning_rate?"),
            ("--learning_rate 1e-4..1e-5", "the range is empty"),
            ("--learning_rate 1e-4..1e-4", "the range is empty"),
            ("--learning_rate 1e-5..", "a range is two numbers, LOW..HIGH"),
            ("--learning_rate 1e-5..much", "'much' is no value of it: it takes a number"),
            ("--global_batch_size 1.5..4", "'1.5' is no value of it: it takes a whole number"),
            ("--warmup_steps 0.1..100", "0.1 is a share of the run and 100 a number of steps"),
            ("--learning_rate 1e-5,,1e-4", "a value of the list is empty"),
            ("--learning_rate 1e-4,1e-4", "a value stands twice"),
            ("--lr_scheduler_type linear,cosin", "did you mean cosine?"),
            ("--r 4,8", "--r has no effect: it needs tune: lora"),
            ("--seed 1,2", "--seeds says how many"),
            ("--eval_split_share 0.1,0.2", "it decides the rows"),
            ("--save_steps 1,2", "the result does not depend on it"),
            ("--max_steps 5", "nothing is searched"),
            ("--learning_rate 1e-5..1e-4 --trials 0", "--trials is 0"),
            ("--learning_rate 1e-5..1e-4 --seeds many", "invalid int value"),
            ("--learning_rate 1e-5..1e-4 --num_processes 0", "--num_processes is 0"),
            ("--learning_rate 1e-5..1e-4 --eval_strategy no", "there is no evaluation data to choose by"),
            ("--learning_rate 1e-5..1e-4 --test_dataset_split x", "--test_dataset_split has no effect"),
            ("--learning_rate 1e-5..1e-4 --parallel 0", "--parallel is 0"),
            ("--learning_rate 1e-5..1e-4 --pruning", "proposed together: say --parallel too"),
            ("--learning_rate 1e-5..1e-4 --sbatch=-N1", "--sbatch has no effect without --slurm"),
            ("--learning_rate 1e-5..1e-4 --slurm --num_processes 2", "a job has a process a GPU"),
            (
                "--learning_rate 1e-5..1e-4 --slurm --engine accelerate_configs/ddp.yaml",
                "ddp.yaml: a job takes ddp, fsdp2",
            ),
            ('--learning_rate 1e-5..1e-4 --slurm --sbatch="', "No closing quotation"),
        ],
    )
    def test_a_mistake_is_one_sentence_and_nothing_is_written(self, recipe, capsys, flags, says):
        with pytest.raises(SystemExit) as leaving:
            main(["sweep", recipe, *flags.split()])
        complaint = capsys.readouterr().err
        assert leaving.value.code == 2
        assert says in complaint and complaint.count("\n") == 1
        assert [file.name for file in Path(recipe).parent.iterdir()] == ["mine.yaml"]

    def test_a_launcher_is_refused(self, recipe, monkeypatch):
        monkeypatch.setenv("LOCAL_RANK", "0")
        with pytest.raises(UserError, match="start it without a launcher"):
            read_plan([recipe, "--learning_rate", "1e-5..1e-4"])

    def test_the_help_names_the_sweeps_own_flags(self, capsys):
        with pytest.raises(SystemExit) as leaving:
            main(["sweep", "--help"])
        shown = capsys.readouterr().out
        assert not leaving.value.code
        assert all(flag in shown for flag in ("--trials", "--seeds", "--test_dataset_name", "--engine", "LOW..HIGH"))


class TestRows:
    """A trial trains on some rows, is chosen by others, and the winner is examined on a third set."""

    def test_a_classifiers_evaluation_data_are_kept_for_the_end(self, recipe):
        plan = read_plan([recipe, "--learning_rate", "1e-5..1e-4"])
        assert plan.recipe.values["eval_dataset_name"] is None and plan.recipe.values["eval_split_share"] == 0.1
        assert plan.test.keys == {"dataset_name": "builtin:opinions", "dataset_split": "test"}
        assert read_plan([recipe, "--learning_rate", "1e-5..1e-4", "--eval_split_share", "0.3"]).recipe.values[
            "eval_split_share"
        ] == pytest.approx(0.3)

    def test_rows_that_are_named_leave_the_evaluation_data_to_choose_by(self, recipe):
        plan = read_plan([recipe, "--learning_rate", "1e-5..1e-4", "--test_dataset_name", "new.csv"])
        assert plan.recipe.values["eval_dataset_name"] == "builtin:opinions"
        assert plan.test.keys == {"dataset_name": "new.csv", "dataset_split": "test"}

    @pytest.mark.parametrize(
        ("changes", "flags", "says"),
        [
            ({"eval_split_share": 0.2}, "", "no rows are left that the search does not see"),
            ({"eval_dataset_name": "builtin:opinions"}, "builtin:opinions", "the search chooses by builtin:opinions"),
            (
                {"eval_split_share": 0.2},
                "builtin:opinions --test_dataset_split train",
                "the search trains on builtin",
            ),
            ({}, "builtin:opinions", "there is no evaluation data"),
        ],
    )
    def test_rows_that_the_search_sees_are_refused(self, tmp_path, changes, flags, says):
        values = {key: value for key, value in TINY_CLASSIFIER.items() if key != "eval_dataset_name"}
        file = write(tmp_path, {**values, "task": "classification", **changes})
        words = ["--test_dataset_name", *flags.split()] if flags else []
        with pytest.raises(UserError, match=says):
            read_plan([file, "--learning_rate", "1e-5..1e-4", *words])

    def test_rows_that_the_search_sees_are_refused_under_another_path_too(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "held.csv").write_text("text,label\na,0\n")
        file = write(tmp_path, {**TINY_CLASSIFIER, "task": "classification", "eval_dataset_name": "held.csv"})
        with pytest.raises(UserError, match=r"the search chooses by \./held.csv"):
            read_plan([file, "--learning_rate", "1e-5..1e-4", "--test_dataset_name", "./held.csv"])

    def test_a_language_model_needs_rows_of_its_own_for_the_end(self, tmp_path):
        file = write(tmp_path, {**TINY, "task": "sft", "eval_dataset_name": "builtin:greetings"})
        with pytest.raises(UserError, match="no rows are left that the search does not see"):
            read_plan([file, "--learning_rate", "1e-5..1e-4"])
        plan = read_plan([file, "--learning_rate", "1e-5..1e-4", "--test_dataset_name", "held.jsonl"])
        assert (plan.command, plan.metric, plan.higher_is_better) == ("sft", "eval_loss", False)


class TestFolder:
    """One folder holds one sweep."""

    def test_the_same_sweep_with_more_trials_goes_on_and_another_is_refused(self, recipe):
        words = [recipe, "--learning_rate", "1e-5..1e-4", "--trials", "2"]
        read_plan(words).claim()
        read_plan([*words[:-1], "9"]).claim()
        for more, key in (
            (["--seeds", "5"], "seeds"),
            (["--parallel", "2"], "parallel"),
            (["--parallel", "2", "--pruning"], "parallel"),
            (["--max_steps", "7"], r"max_steps \(recipe\)"),
            (["--warmup_steps", "0,1"], r"warmup_steps \(search\)"),
        ):
            with pytest.raises(UserError, match=f"holds another sweep, with another {key}"):
                read_plan([*words, *more]).claim()

    def test_a_sweep_that_knew_no_parallel_trials_goes_on_with_one_at_a_time(self, recipe):
        words = [recipe, "--learning_rate", "1e-5..1e-4"]
        plan = read_plan(words)
        plan.claim()
        file = plan.folder / "search.json"
        file.write_text(
            json.dumps({name: of for name, of in json.loads(file.read_text()).items() if name != "parallel"})
        )
        read_plan(words).claim()
        with pytest.raises(UserError, match="with another parallel"):
            read_plan([*words, "--parallel", "2"]).claim()

    def test_the_trials_recipe_is_the_plans_without_uploads(self, recipe):
        plan = read_plan([recipe, "--learning_rate", "1e-5..1e-4", "--push_to_hub", "true"])
        plan.claim()
        written = yaml.safe_load((plan.folder / "sweep.yaml").read_text())
        assert written["eval_split_share"] == 0.1 and written.get("push_to_hub") in (None, False)

    def test_a_folder_of_something_else_is_left_alone(self, recipe, tmp_path):
        (tmp_path / "there").mkdir()
        (tmp_path / "there/notes.txt").write_text("mine")
        plan = read_plan([recipe, "--learning_rate", "1e-5..1e-4", "--output_dir", str(tmp_path / "there")])
        with pytest.raises(UserError, match="holds no sweep"):
            plan.claim()
        assert [file.name for file in (tmp_path / "there").iterdir()] == ["notes.txt"]


class Killed(Exception):
    """What ends a made-up sweep in the middle of a trial."""


class Scores:
    """A made-up metric, best at a learning rate of 1e-4 and without warm-up; asking for trial `killed_in` dies."""

    def __init__(self, killed_in: int = 0, lucky: int = 0) -> None:
        self.seen: list[tuple[int, dict]] = []
        self._killed_in, self._lucky = killed_in, lucky

    def __call__(self, generation: Mapping[int, dict]) -> list[float | None]:
        return [self._of(number, values) for number, values in generation.items()]

    def _of(self, number: int, values: dict) -> float | None:
        self.seen.append((number, values))
        if number == self._killed_in:
            raise Killed
        if number == self._lucky:
            return 9.0
        rate = values.get("learning_rate", 1e-4)
        return None if number == 3 else -abs(math.log10(rate) + 4) - values.get("warmup_steps", 0) / 1000


def searched(
    folder: Path, score: Scores, trials: int, axes=(RATES, WARMUP), default=None, parallel: int = 1
) -> list[Tried]:
    folder.mkdir(exist_ok=True)
    first = Tried(default or {"learning_rate": 2e-5, "warmup_steps": 0}, -0.7)
    what = Search(list(axes), trials, seed=42, higher_is_better=True, parallel=parallel)
    return list(search(folder, what, first, score))


class TestStudy:
    """Which values are tried next."""

    @pytest.mark.parametrize("parallel", [1, 4])
    def test_a_sweep_that_is_killed_tries_what_the_whole_one_tries(self, tmp_path, parallel):
        whole = searched(tmp_path / "whole", Scores(), 22, parallel=parallel)
        killed = Scores(killed_in=14)
        with pytest.raises(Killed):
            searched(tmp_path / "killed", killed, 22, parallel=parallel)
        again = Scores()
        assert searched(tmp_path / "killed", again, 22, parallel=parallel) == whole
        assert killed.seen == again.seen[:14]
        assert [number for number, _ in again.seen] == list(range(1, 23))

    @pytest.mark.parametrize("parallel", [1, 4])
    def test_more_trials_are_those_of_a_sweep_that_had_as_many_from_the_beginning(self, tmp_path, parallel):
        first = searched(tmp_path / "one", Scores(), 14, parallel=parallel)
        later = searched(tmp_path / "one", Scores(), 18, parallel=parallel)
        assert later[:14] == first
        assert later == searched(tmp_path / "whole", Scores(), 18, parallel=parallel)

    def test_one_after_the_other_are_the_proposals_of_optunas_own_study(self, tmp_path):
        tried = searched(tmp_path, Scores(), 16)
        study = optuna.create_study(direction="maximize")
        for number, one in enumerate(tried):
            seed = int(np.random.SeedSequence((42, number)).generate_state(1)[0])
            study.sampler = optuna.samplers.TPESampler(seed=seed)
            trial = study.ask({axis.key: axis.distribution() for axis in (RATES, WARMUP)})
            assert trial.params == one.values
            assert not isinstance(one.score, Pruned)
            failed = optuna.trial.TrialState.FAIL if one.score is None else None
            study.tell(trial, one.score, failed)

    def test_a_generation_is_proposed_by_the_scores_of_those_before_it_alone(self, tmp_path):
        plain = [one.values for one in searched(tmp_path / "plain", Scores(), 24, parallel=4)]
        lucky = [one.values for one in searched(tmp_path / "lucky", Scores(lucky=13), 24, parallel=4)]
        assert plain[:16] == lucky[:16] and plain[16:20] != lucky[16:20]  # the fourth generation is 13 to 16
        assert len({repr(values) for values in plain}) == 24

    def test_the_search_comes_closer_than_chance(self, tmp_path):
        later = searched(tmp_path, Scores(), 50)[10:]  # the first ten are drawn at random
        near = sum(abs(math.log10(one.values["learning_rate"]) + 4) < 0.5 for one in later)  # by chance every second
        assert binomtest(near, len(later), 0.5, alternative="greater").pvalue < 0.01

    def test_a_few_values_are_all_tried_once_and_the_default_is_not_repeated(self, tmp_path):
        axes = (Axis("warmup_steps", choices=(0, 100)), Axis("global_batch_size", low=7, high=9))
        score = Scores()
        tried = searched(tmp_path, score, 20, axes, {"warmup_steps": 0, "global_batch_size": 8})
        expected = {(w, b) for w in (0, 100) for b in (7, 8, 9)} - {(0, 8)}
        assert len(tried) == 5 and {tuple(one.values.values()) for one in tried} == expected
        assert searched(tmp_path, Scores(), 20, axes, {"warmup_steps": 0, "global_batch_size": 8}) == tried

    def test_no_values_are_tried_twice(self, tmp_path):
        axes = (Axis("global_batch_size", low=1, high=12),)
        tried = searched(tmp_path, Scores(), 8, axes, {"global_batch_size": 3})
        values = [one.values["global_batch_size"] for one in tried]
        assert len(values) == len({*values}) == 8 and 3 not in values

    def test_a_grid_is_every_combination_or_none_at_all(self):
        assert grid([WARMUP, Axis("r", low=1, high=2)], 4) == [
            {"warmup_steps": w, "r": r} for w in (0, 100) for r in (1, 2)
        ]
        assert grid([WARMUP, Axis("r", low=1, high=2)], 3) is None and grid([RATES], 10**6) is None

    def test_a_journal_of_something_else_is_refused(self, tmp_path):
        (tmp_path / "journal.log").write_text("not a journal\n")
        with pytest.raises(UserError, match=r"journal\.log is no journal of a sweep"):
            searched(tmp_path, Scores(), 2)


A, B, C = (0.80, 0.82, 0.81, 0.83), (0.84, 0.85, 0.86, 0.86), (0.81, 0.82, 0.80, 0.84)


def t_test(differences) -> tuple[float, float, float]:
    """Low, high and p of Student's paired test, by its formula."""
    d = np.asarray(differences)
    error = d.std(ddof=1) / math.sqrt(len(d))
    width = student.ppf(0.975, len(d) - 1) * error
    return d.mean() - width, d.mean() + width, 2 * student.sf(abs(d.mean() / error), len(d) - 1)


class TestRanking:
    """What the figures say of made-up results."""

    def test_a_difference_over_seeds_is_that_of_the_paired_t_test(self):
        found = compare_seeds(A, B)
        low, high, p = t_test(np.subtract(B, A))
        assert (found.low, found.high, found.p) == pytest.approx((low, high, p))
        assert found.difference == pytest.approx(np.mean(B) - np.mean(A))

    def test_equal_differences_are_not_taken_for_certainty(self):
        found = compare_seeds((0.5, 0.6, 0.7), (0.6, 0.7, 0.8))
        assert found.low is None and found.p == 2 / 2**3
        assert compare_seeds((0.5, 0.6), (0.5, 0.6)).p == 1.0
        assert compare_seeds((0.5,), (0.6,)).p is None

    def test_trials_are_ranked_by_their_mean_with_p_corrected_for_their_number(self, recipe):
        plan = read_plan([recipe, "--learning_rate", "1e-5..1e-4", "--seeds", "4"])
        trials = [Trial(0, {}, A), Trial(1, {}, B), Trial(2, {}, (), "diverged"), Trial(3, {}, C)]
        ranking = rank(plan, trials)
        assert [trial.number for trial in ranking.trials] == [1, 3, 0, 2]
        p_values = [t_test(np.subtract(one, A))[2] for one in (B, C)]
        expected = multipletests(p_values, method="holm")[1]
        assert [ranking.trials[place].p_holm for place in (0, 1)] == pytest.approx(expected)
        assert ranking.default.p_holm is None and ranking.winner.number == 1

    def test_where_lower_is_better_the_lowest_wins_and_of_equal_ones_the_earlier(self, tmp_path):
        file = write(tmp_path, {**TINY_CLASSIFIER, "task": "classification"})
        plan = read_plan([file, "--learning_rate", "1e-5..1e-4"])
        ranking = rank(plan, [Trial(0, {}, A), Trial(1, {}, B), Trial(2, {}, A)])
        assert [trial.number for trial in ranking.trials] == [0, 2, 1]

    @pytest.mark.parametrize(
        ("winner", "says"),
        [
            (B, "beats the default beyond seed noise"),
            (C, "does not beat the default beyond seed noise"),
            (tuple(0.1 + 0.9 * value for value in np.subtract(A, 0.2)), "is worse than the default beyond seed noise"),
        ],
    )
    def test_the_last_sentence_is_what_the_new_rows_say(self, recipe, winner, says):
        plan = read_plan([recipe, "--learning_rate", "1e-5..1e-4", "--seeds", "4"])
        ranking = rank(plan, [Trial(0, {"learning_rate": 1e-3}, A), Trial(1, {"learning_rate": 1e-4}, B)])
        examined = Examined("accuracy", "builtin:opinions (test)", 120, winner, A, compare_seeds(A, winner))
        sentence = verdict(ranking, examined)
        assert says in sentence and f"accuracy {np.mean(winner):.4f} against 0.8150 of the default" in sentence
        assert "120 rows that the search never saw" in sentence

    def test_one_seed_and_a_default_that_wins_have_sentences_of_their_own(self, recipe):
        plan = read_plan([recipe, "--learning_rate", "1e-5..1e-4", "--seeds", "1"])
        ranking = rank(plan, [Trial(0, {}, (0.8,)), Trial(1, {}, (0.9,))])
        assert ranking.winner.p_holm is None
        examined = Examined("accuracy", "x", 9, (0.9,), (0.8,), compare_seeds((0.8,), (0.9,)))
        assert "one seed shows no seed noise" in verdict(ranking, examined)
        ranking = rank(plan, [Trial(0, {}, (0.9,)), Trial(1, {}, (0.8,))])
        same = Examined("accuracy", "x", 9, (0.7,), (0.7,), None)
        assert verdict(ranking, same).startswith("No trial has a better accuracy than the default")

    def test_the_table_and_the_picture_show_every_trial(self, recipe, tmp_path):
        plan = read_plan([recipe, "--learning_rate", "1e-5..1e-4", "--seeds", "4"])
        values = [{"learning_rate": rate} for rate in (1e-3, 5e-5, 2e-5)]
        trials = [Trial(0, values[0], A), Trial(1, values[1], B), Trial(2, values[2], (), "diverged")]
        ranking = rank(plan, trials)
        lines = table(ranking)
        assert [line.split()[0] for line in lines] == ["trial", "trial-001", "trial-000", "trial-002"]
        assert "5e-05" in lines[1] and "0.8525" in lines[1] and "+0.0375" in lines[1] and "failed" in lines[3]
        picture = draw_ranking(ranking, tmp_path)
        assert picture.read_bytes()[:4] == b"\x89PNG"
        assert picture.with_suffix(".txt").read_text().splitlines()[1:] == lines

    def test_the_table_of_the_documentation_is_that_of_these_figures(self, recipe):
        plan = read_plan([recipe, "--learning_rate", "1e-5..1e-4", "--seeds", "4"])
        rates = ({"learning_rate": 1e-3}, {"learning_rate": 5e-5})
        lines = table(rank(plan, [Trial(0, rates[0], A), Trial(1, rates[1], B)]))
        page = (Path(__file__).parents[2] / "docs/sweep.md").read_text()
        assert "\n".join(f"    {line}" for line in lines) in page

    def test_a_metric_of_training_is_found_in_an_evaluation(self):
        assert metric_in_result("eval_f1_macro", ["accuracy", "f1_macro"]) == "f1_macro"
        assert metric_in_result("eval_loss", ["accuracy", "log_loss"]) == "log_loss"
        assert metric_in_result("eval_loss", ["rmse", "mean_squared_error"]) == "mean_squared_error"
        assert metric_in_result("eval_loss", ["chrf", "nll", "perplexity"]) == "perplexity"
        assert metric_in_result("eval_pearson", ["accuracy"]) is None


class TestRuns:
    """What is read of a run, and how one is started."""

    @pytest.fixture
    def finished(self, recipe):
        """A function that leaves a finished run with these evaluations, and gives its trial."""

        def value(accuracies: list, *flags: str, first: int = 1) -> Trial:
            plan = read_plan([recipe, "--learning_rate", "1e-5..1e-4", "--seeds", "1", *flags])
            run = runs.folder_of(plan, 1, 42)
            run.mkdir(parents=True, exist_ok=True)
            (run / "recipe.yaml").write_text("task: classification\n")
            (run / "status.json").write_text(json.dumps({"status": "finished"}))
            lines = [{"step": n, "eval_loss": 1.0, "eval_accuracy": a} for n, a in enumerate(accuracies, first)]
            (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            machine = Scripted()
            (trial,) = runs.train(plan, machine, {1: {"learning_rate": 1e-5}})
            assert machine.commands == []
            return trial

        return value

    def test_a_finished_run_is_not_repeated_and_counts_with_the_model_that_it_keeps(self, finished):
        assert finished([0.5, 0.9, 0.7]).scores == (0.7,)
        assert finished([0.5, 0.9, 0.7], "--load_best_model_at_end", "true").scores == (0.9,)

    def test_the_evaluation_before_training_is_of_no_model_that_a_run_keeps(self, finished):
        assert finished([0.9, 0.5, 0.7], "--load_best_model_at_end", "true", first=0).scores == (0.7,)

    def test_a_metric_that_is_no_number_fails_the_trial_and_no_evaluation_stops_the_sweep(self, finished):
        assert "eval_accuracy is not a finite number" in str(finished([0.5, None]).failure)
        with pytest.raises(UserError, match="has ended without an evaluation"):
            finished([])

    @pytest.fixture
    def ends(self, recipe, monkeypatch):
        """A function that trains a trial whose commands end in these ways, and gives it with the seeds that began."""

        def train(number: int, *ended: start.Ended) -> tuple[Trial, list[str]]:
            machine = Scripted(*ended)
            monkeypatch.setattr(runs, "_kept_value", lambda *_: 0.5)
            plan = read_plan([recipe, "--learning_rate", "1e-5..1e-4"])
            (trial,) = runs.train(plan, machine, {number: {"learning_rate": 1e-5}})
            return trial, [command.folder.name for command in machine.commands]

        return train

    def test_a_trial_is_its_three_seeds(self, ends):
        trial, begun = ends(1)
        assert trial.scores == (0.5, 0.5, 0.5) and begun == ["seed-42", "seed-43", "seed-44"]

    @pytest.mark.parametrize("reason", [MEMORY, VALUES])
    def test_values_that_a_model_or_the_memory_does_not_take_fail_a_trial_and_no_default(self, ends, reason):
        ended = start.Ended(2, "what is wrong", reason)
        trial, begun = ends(1, ended)
        assert "what is wrong" in str(trial.failure) and trial.scores == ()
        assert begun == ["seed-42"], "its other seeds are not trained"
        with pytest.raises(UserError, match="what is wrong"):
            ends(0, ended)

    def test_a_full_disk_is_no_fault_of_a_trial(self, ends):
        with pytest.raises(UserError, match="no room on the disk"):
            ends(1, start.Ended(2, "there is no room on the disk"))

    def test_a_killed_run_goes_on_once_and_fails_when_it_is_killed_again(self, ends):
        killed = start.Ended(1)
        assert ends(1, killed)[1] == ["seed-42", "seed-42", "seed-43", "seed-44"]
        assert "was ended twice with status 1" in str(ends(1, killed, killed)[0].failure)

    def test_a_run_that_was_stopped_stops_the_sweep(self, ends):
        with pytest.raises(Preempted, match="stopped after step 7; the same sweep goes on from there"):
            ends(1, start.Ended(75, "stopped after step 7"))

    def test_a_mistake_of_one_trial_s_run_is_no_failed_trial(self, recipe, monkeypatch, capsys):
        ended = [start.Ended(0), start.Ended(2, "the folder is in use")]
        monkeypatch.setattr(command, "_machine", lambda _: Scripted(*ended))
        monkeypatch.setattr(runs, "_kept_value", lambda *_: 0.5)
        monkeypatch.setattr(runs, "examine", lambda *_: None)
        with pytest.raises(UserError, match="trial-001/seed-42: the folder is in use"):
            command.run([recipe, "--learning_rate", "1e-5..1e-4", "--seeds", "1", "--trials", "2"])
        assert "has failed" not in capsys.readouterr().out


def test_a_run_by_rules_is_tested_by_its_rules(tmp_path):
    plan = SimpleNamespace(command="classify", folder=tmp_path, test=SimpleNamespace(keys={"dataset_name": "x.csv"}))
    runs._test_flags(plan, {"label_source": "rules", "dataset_text_field": "prompt", "dataset_label_field": "label"})
    written = yaml.safe_load((tmp_path / runs.TEST_TASK).read_text())
    assert written == {"dataset_name": "x.csv", "dataset_text_field": "prompt", "label_source": "rules"}
