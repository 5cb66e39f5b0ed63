"""`isotune sft | classify | eval | chat`: the same runs as the scripts', with the run's own exit status."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from tests.launching import TINY, TINY_CLASSIFIER, Finished, run_command, start, start_command, write_recipe

ISOTUNE = [sys.executable, "-m", "isotune.cli"]
LAUNCHED = ("--num_processes", "2", "--engine")
EXACT = TINY_CLASSIFIER | {"exact_gradients": True}
LONG = TINY | {"max_steps": 400, "save_steps": 1000, "global_batch_size": 2}


def isotune(*words: str, expect: int = 0) -> subprocess.CompletedProcess[str]:
    """Run `isotune WORDS`; asserts the exit status `expect`."""
    done = run_command([*ISOTUNE, *words])
    assert done.returncode == expect, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def by_script(tmp_path_factory) -> Finished:
    """A run of train/yelp.py on one process."""
    return start(tmp_path_factory.mktemp("script"), EXACT, script="train/yelp.py")


@pytest.fixture(scope="module")
def by_command(tmp_path_factory) -> Finished:
    """The same recipe by `isotune classify` on two processes."""
    folder = tmp_path_factory.mktemp("command")
    done = isotune("classify", str(write_recipe(folder, EXACT)), *LAUNCHED, "ddp")
    return Finished(done.returncode, done.stdout, done.stderr, folder / "run")


def test_a_command_on_two_processes_gives_the_losses_of_the_script(by_script, by_command):
    assert by_command.environment["world_size"] == 2
    assert by_command.stdout.startswith("launching   ddp on 2 processes\n")
    assert [step["loss"] for step in by_command.steps] == [step["loss"] for step in by_script.steps]
    assert by_command.evaluations[-1]["eval_loss"] == by_script.evaluations[-1]["eval_loss"]


def test_a_finished_run_is_evaluated_by_its_kind_on_its_own_data(by_command):
    isotune("eval", str(by_command.run), *LAUNCHED, "ddp", "--no_pictures", "--resamples", "50")
    (file,) = by_command.run.glob("eval/*/metrics.json")
    found = json.loads(file.read_text())
    assert found["accuracy"] == pytest.approx(by_command.evaluations[-1]["eval_accuracy"], abs=1e-6)
    refused = isotune("chat", str(by_command.run), expect=2)
    assert "is the run of a classifier" in refused.stderr


def test_a_language_model_is_trained_evaluated_and_asked(tmp_path):
    recipe = write_recipe(tmp_path, TINY | {"eval_dataset_name": "builtin:greetings", "max_steps": 2})
    isotune("sft", str(recipe))
    run = str(tmp_path / "run")
    isotune("eval", run, "--limit", "2", "--max_new_tokens", "4")
    (file,) = (tmp_path / "run").glob("eval/*/metrics.json")
    assert json.loads(file.read_text())["rows"] == 2
    asked = isotune("chat", run, "--prompt", "Hello?", "--max_new_tokens", "4").stdout
    command = [sys.executable, "eval/generate.py", "--run_dir", run, "--prompt", "Hello?", "--max_new_tokens", "4"]
    assert asked == run_command(command).stdout
    again = isotune("sft", run)
    assert "nothing to do" in again.stdout or "finished" in again.stdout


@pytest.mark.parametrize("engine", ["ddp", pytest.param("zero2", marks=pytest.mark.slow)])
def test_a_mistake_that_the_processes_find_is_one_sentence_and_status_2(tmp_path, engine):
    (tmp_path / "reviews.csv").write_text("review,stars\ngood,5\nbad,1\n")
    recipe = write_recipe(tmp_path, EXACT | {"dataset_name": str(tmp_path / "reviews.csv")})
    done = isotune("classify", str(recipe), *LAUNCHED, engine, expect=2)
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")] == done.stderr.splitlines()
    assert "lacks the column 'text'" in done.stderr


def test_a_mistake_in_the_recipe_starts_no_process():
    done = isotune("sft", "demo_base", *LAUNCHED, "ddp", "--learning_rat", "1", expect=2)
    assert done.stdout == "" and done.stderr == "error: --learning_rat is not a key: did you mean --learning_rate?\n"


class TestEnds:
    """How a launch ends."""

    @pytest.fixture
    def running(self, tmp_path):
        """A long run on two processes, in its third step."""
        process = start_command([*ISOTUNE, "sft", str(write_recipe(tmp_path, LONG)), *LAUNCHED, "ddp"])
        metrics, deadline = tmp_path / "run/metrics.jsonl", time.monotonic() + 120
        while not metrics.exists() or metrics.read_text().count("\n") < 3:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield process
        process.send_signal(signal.SIGKILL)
        process.wait(60)

    @pytest.mark.parametrize(
        "number",
        [signal.SIGTERM, *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGINT, signal.SIGUSR1))],
    )
    def test_a_signal_stops_it_with_a_checkpoint_and_status_75_and_it_goes_on(self, running, tmp_path, number):
        running.send_signal(number)
        _, errors = running.communicate(timeout=60)
        assert running.returncode == 75
        assert "the same command goes on from" in errors and "Traceback" not in errors
        status = json.loads((tmp_path / "run/status.json").read_text())
        assert (status["status"], status["exit_status"]) == ("preempted", 75)
        assert list((tmp_path / "run/checkpoints").iterdir())

    def test_a_rank_that_is_killed_is_named_and_the_status_is_1(self, running):
        ranks = sorted(ranks_of(running.pid), key=lambda rank: rank.environ()["RANK"])
        ranks[1].kill()
        _, errors = running.communicate(timeout=60)
        assert running.returncode == 1
        assert "error: process 1 of the launch was ended by SIGKILL" in errors
        assert "ChildFailedError" not in errors

    def test_nothing_outlives_the_command(self, running, tmp_path):
        launched = psutil.Process(running.pid).children(recursive=True)
        assert len(launched) >= 3
        os.kill(running.pid, signal.SIGKILL)
        _, alive = psutil.wait_procs(launched, timeout=60)
        assert alive == []
        assert json.loads((tmp_path / "run/status.json").read_text())["status"] == "preempted"


def ranks_of(command: int) -> list[psutil.Process]:
    """The processes that train, of the launcher of a command."""
    return [child for child in psutil.Process(command).children(recursive=True) if "RANK" in child.environ()]
