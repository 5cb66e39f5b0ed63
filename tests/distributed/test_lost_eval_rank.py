"""A rank of an evaluation or a prediction that dies or falls silent ends the launch, and is named by host and place."""

import json
import re
import signal
import socket
import sys
import time
from pathlib import Path

import psutil
import pytest
from tests.building import build, build_classifier
from tests.launching import launcher, run_command, start_command

from isotune.training.from_recipe import save

HOST = re.escape(socket.gethostname())
RUNNER = "tests/distributed/losing_rank.py"
BOUND_SECONDS = 6
BOUND = ["--ddp_timeout", str(BOUND_SECONDS)]

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="stops processes as Linux does")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Path:
    built = build_classifier(tmp_path_factory.mktemp("classifier"), max_steps=1)
    built.trainer.train()
    save(built.start, built.trainer)
    return built.run.path


@pytest.fixture(scope="module")
def language_model(tmp_path_factory) -> Path:
    built = build(tmp_path_factory.mktemp("language-model"), max_steps=1, tune="lora")
    built.trainer.train()
    save(built.start, built.trainer)
    return built.run.path


def classify(run: Path, folder: Path) -> list[str]:
    options = ["--limit", "40", "--batch_size", "4", "--no_pictures", "--output_dir", str(folder)]
    return ["eval/classify.py", "--run_dir", str(run), *options]


def generate(run: Path, folder: Path) -> list[str]:
    options = ["--dataset_name", "builtin:greetings", "--dataset_split", "train", "--limit", "12", "--batch_size", "2"]
    return ["eval/generate.py", "--run_dir", str(run), *options, "--max_new_tokens", "4", "--output_dir", str(folder)]


def errors_of(printed: str) -> list[str]:
    return [line for line in printed.splitlines() if line.startswith("error: ")]


def check_logs(folder: Path, name: str) -> None:
    for rank in range(2):
        first = (folder / "logs" / f"{name}-{rank}.log").read_text().splitlines()[0]
        assert re.fullmatch(rf".* rank {rank} of 2 on {HOST}, process \d+", first)


@pytest.mark.slow  # in short: test_watchdog.py
@pytest.mark.parametrize("what", ["classify", "generate"])
def test_a_rank_that_is_killed_is_named_by_one_sentence(request, tmp_path, what):
    run, words = ("classifier", classify) if what == "classify" else ("language_model", generate)
    command = words(request.getfixturevalue(run), tmp_path / "result")
    done = run_command([*launcher("ddp.yaml", 2), RUNNER, "SIGKILL", "self", *command, *BOUND])
    assert done.returncode != 0
    (sentence,) = errors_of(done.stderr)
    gone = rf"error: rank 1 on {HOST} is gone, killed or cut off: last in batch 2 of its \d+"
    assert re.fullmatch(gone, sentence)
    check_logs(tmp_path / "result", "eval-rank")
    assert not (tmp_path / "result" / "metrics.json").exists()


@pytest.mark.slow  # the launcher gives a stopped process another 30 s before it kills it
@pytest.mark.parametrize("what", ["classify", "generate"])
def test_a_rank_that_is_stopped_is_named_within_the_bound(request, tmp_path, what):
    run, words = ("classifier", classify) if what == "classify" else ("language_model", generate)
    command = words(request.getfixturevalue(run), tmp_path / "result")
    began = time.monotonic()
    done = run_command([*launcher("ddp.yaml", 2), RUNNER, "SIGSTOP", "self", *command, *BOUND])
    assert time.monotonic() - began < BOUND_SECONDS + 30 + 40
    assert done.returncode != 0
    (sentence,) = errors_of(done.stderr)
    seen = "no rank has made progress|a rank shows no sign of life"
    where = rf"rank 1 on {HOST} hangs in batch 2 of its \d+, and the others wait"
    assert re.fullmatch(rf"error: ({seen}) for {BOUND_SECONDS} s \(ddp_timeout\): {where}", sentence)
    check_logs(tmp_path / "result", "eval-rank")


@pytest.mark.slow
def test_a_launch_that_the_user_stops_loses_no_rank(tmp_path, classifier):
    command = classify(classifier, tmp_path / "result")
    done = run_command([*launcher("ddp.yaml", 2), RUNNER, "SIGTERM", "launcher", *command, *BOUND])
    assert done.returncode != 0
    assert errors_of(done.stderr) == []


@pytest.mark.slow
@pytest.mark.parametrize("what", ["eval", "predict"])
def test_a_killed_rank_of_the_command_is_a_fault_and_not_a_stop(tmp_path, classifier, what):
    if what == "eval":
        words, log = ["eval", str(classifier), "--output_dir", str(tmp_path / "e")], tmp_path / "e/logs/eval-rank-1.log"
    else:
        texts = tmp_path / "texts.jsonl"
        texts.write_text("".join(json.dumps({"text": f"Text number {n} is fine."}) + "\n" for n in range(200)))
        output = tmp_path / "p.jsonl"
        words = ["predict", str(classifier), "--input", str(texts), "--output", str(output)]
        log = tmp_path / "p.jsonl.logs/rank-1.log"
    command = start_command([sys.executable, "-m", "isotune.cli", *words, "--num_processes", "2", *BOUND])
    deadline = time.monotonic() + 120
    while not log.exists() or not log.read_text():
        assert command.poll() is None, command.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    children = psutil.Process(command.pid).children(recursive=True)
    (lost,) = [child for child in children if child.environ().get("RANK") == "1"]
    lost.send_signal(signal.SIGKILL)
    _, errors = command.communicate(timeout=60)
    assert command.returncode == 1
    assert "error: process 1 of the launch was ended by SIGKILL" in errors
    assert re.search(rf"error: rank 1 on {HOST} is gone, killed or cut off: last in ", errors)
