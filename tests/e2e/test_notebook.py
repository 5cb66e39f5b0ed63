"""Runs from Python: the same bits as the command, and what a notebook shows of them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.launching import run_command

import isotune
from isotune.commands.sft import read_sft_recipe
from isotune.config import Recipe
from isotune.io.errors import UserError
from isotune.notebook import launching
from isotune.notebook.launching import as_flags

KEYS = {"model": "builtin:opt-tiny", "tune": "full", "max_steps": 4, "max_seq_length": 128, "global_batch_size": 8}
KEYS |= {"eval_dataset_name": "builtin:greetings", "sample_prompt": "", "disable_tqdm": True}


def run_forked(words: Sequence[str]) -> None:
    """What `launching.run_command` does where nothing fails, by a fork."""
    done = run_command([sys.executable, "-m", "isotune.cli", *words])
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> isotune.Run:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("isotune.notebook.run.run_command", run_forked)
        return isotune.sft("builtin:greetings", output_dir=str(tmp_path_factory.mktemp("sft") / "run"), **KEYS)


@pytest.mark.slow
def test_a_run_is_that_of_the_command_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run = isotune.sft("builtin:greetings", output_dir=str(tmp_path / "python"), **KEYS)
    words = ["sft", "builtin:greetings", "--model_name_or_path", KEYS["model"], "--output_dir", str(tmp_path / "run")]
    flags = as_flags({name: value for name, value in KEYS.items() if name != "model"})
    done = run_command([sys.executable, "-m", "isotune.cli", *words, *flags])
    assert done.returncode == 0, done.stderr
    ours, theirs = (folder / "model" / "model.safetensors" for folder in (run.path, tmp_path / "run"))
    assert ours.read_bytes() == theirs.read_bytes()
    steps = isotune.load(tmp_path / "run").record.steps
    assert [line["loss"] for line in run.record.steps.values()] == [line["loss"] for line in steps.values()]


def test_a_command_runs_in_a_process_of_its_own_and_its_mistake_is_raised(capsys: pytest.CaptureFixture[str]):
    launching.run_command(["ls", "engines"])
    assert "fsdp2" in capsys.readouterr().out
    with pytest.raises(UserError, match="there is no run folder"):
        launching.run_command(["report", "/nowhere/run"])


def test_it_evaluates_answers_compares_and_reports(run: isotune.Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("isotune.notebook.run.run_command", run_forked)
    evaluated = run.evaluate(max_new_tokens=4, limit=6)
    assert evaluated.metrics["exact_match"] == run.results["greetings"].metrics["exact_match"]
    low, high = evaluated.intervals["chrf"]
    assert low <= evaluated.metrics["chrf"] <= high
    assert "<td>chrf</td>" in evaluated._repr_html_() and len(evaluated.predictions) == 6
    answers = run.predict(["Greet Ada in German.", [{"role": "user", "content": "Greet Ada."}]], max_new_tokens=3)
    assert len(answers) == 2 and all(isinstance(answer, str) for answer in answers)
    compared = run.compare(isotune.load(run.path), resamples=200)
    assert "no difference" in repr(compared).lower() and "<pre>" in compared._repr_html_()
    page = run.report()
    assert page.file == run.path / "report.html" and "<iframe srcdoc=" in page._repr_html_()
    shown = run._repr_html_()
    assert "data:image/png;base64," in shown and "chrf" in shown


def test_mistakes_are_one_sentence_before_anything_starts(tmp_path: Path):
    with pytest.raises(UserError, match="learning_rat is not a key") as caught:
        isotune.sft("builtin:greetings", model="builtin:opt-tiny", output_dir=str(tmp_path / "run"), learning_rat=1)
    assert not (tmp_path / "run").exists()
    assert caught.value._render_traceback_() == [f"UserError: {caught.value}"]
    with pytest.raises(UserError, match="there is no run folder"):
        isotune.load(tmp_path / "none")


@pytest.mark.slow
def test_an_interrupt_ends_in_a_checkpoint_from_which_the_same_call_goes_on(tmp_path: Path):
    call = f"isotune.sft('builtin:greetings', output_dir={str(tmp_path / 'run')!r}, **{KEYS | {'max_steps': 3000}!r})"
    code = "import isotune\nfrom isotune.io.errors import Preempted\n"
    code += f"try:\n    {call}\nexcept Preempted as error:\n    print('kept', error)"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    ends = time.monotonic() + 120
    while time.monotonic() < ends and not (metrics.is_file() and metrics.read_text().count('"loss"') > 2):
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=120)
    assert "kept stopped after step" in said and "the same command goes on from" in said.splitlines()[-1]
    stopped = len(isotune.load(tmp_path / "run").record.steps)
    assert 2 < stopped < 3000
    again = isotune.sft("builtin:greetings", output_dir=str(tmp_path / "run"), **KEYS | {"max_steps": 3000})
    assert len(again.record.steps) == 3000


def test_python_values_become_the_words_of_flags():
    keys = {"a": None, "b": True, "c": 1e-4, "names": ["x", "y z"], "pattern": {"q": 8}, "many": [{"q": None}, "r"]}
    flags = ["--b=true", "--c=0.0001", "--names", "x", "y z", '--pattern={"q": 8}', '--many=[{"q": null}, "r"]']
    assert as_flags(keys) == flags


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lr_scheduler_kwargs", {"num_cycles": 2}),
        ("rank_pattern", {"q_proj": 8, "layers.0=.*v_proj": 16}),
        ("dataset_mixture", {"a b.jsonl": 2, "ü.jsonl": 0.5}),
        ("dataset_mixture", [{"dataset_name": "a.jsonl", "columns": ["text"]}, {"path": "b.jsonl", "weight": 0.5}]),
        ("dataset_mixture", [{"dataset_name": "a.jsonl", "dataset_split": None}, "b.jsonl"]),
        ("dataset_mixture", {Path("a.jsonl"): 1}),
    ],
)
def test_a_mapping_is_read_from_its_flag_as_from_a_recipe(key: str, value: Any):
    own: dict[str, Any] = {"model_name_or_path": "a/model", "output_dir": "runs/x", key: value}
    own |= {"lr_scheduler_kwargs": {"lr_scheduler_type": "cosine_with_restarts"}}.get(key, {})
    own |= {} if key == "dataset_mixture" else {"dataset_name": "a/b"}
    values = {**own, key: {str(name): item for name, item in value.items()}} if isinstance(value, dict) else own
    assert read_sft_recipe(as_flags(own), default_config=None, prog="sft").values == Recipe.from_values(**values).values
