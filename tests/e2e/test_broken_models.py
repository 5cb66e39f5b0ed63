"""Whatever becomes of a file that a finished run is used by, each command answers, or says one sentence and 2."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.building import build, build_classifier
from tests.e2e.test_broken_run_files import HYPOTHESIS, SHAPES, corrupted, outcome

from isotune.cli import main
from isotune.io.errors import run_script
from isotune.report.model_card import write_model_card
from isotune.serving.limits import Limits
from isotune.serving.server import open_run
from isotune.training.from_recipe import save

SECONDS = 30.0  # of CPU time, that no command may take: a model is opened in each
TEXT = "a fine meal, and a slow waiter"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A classifier's adapter with all its files, and a language model's, each on a base that the run has drawn."""
    folder = tmp_path_factory.mktemp("used")
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ISOTUNE_CACHE", str(folder / "cache"))
        values = {"tune": "lora", "max_steps": 1, "save_steps": 1}
        builders: dict[str, Callable[..., Any]] = {"classify": build_classifier, "sft": build}
        for kind, made in builders.items():
            built = made(folder / kind, **values)
            built.trainer.train()
            save(built.start, built.trainer)
            found[kind] = built.run.path
    return found


def commands(run: Path, kind: str) -> dict[str, Callable[[], Any]]:
    """What uses a run, by name."""
    ask: dict[str, list[str]] = {
        "classify": ["predict", str(run), TEXT],
        "sft": ["chat", str(run), "--prompt", "What is it?", "--max_new_tokens", "2"],
    }
    data = {"classify": "builtin:opinions", "sft": "builtin:greetings"}[kind]
    rows = ["--dataset_name", data, "--dataset_split", "test", "--limit", "3", "--output_dir", str(run.parent / "eval")]
    few = {"classify": ["--no_pictures", "--resamples", "100"], "sft": ["--max_new_tokens", "2"]}
    return {
        "eval": lambda: main(["eval", str(run), *rows, *few[kind]]),
        "ask": lambda: main(ask[kind]),
        "serve": lambda: run_script(lambda: print(open_run(run, Limits(), 0)[1])),
        "resume": lambda: main([kind, str(run)]),
        "report": lambda: main(["report", str(run), "--output", str(run.parent / "page.html")]),
        "card": lambda: run_script(lambda: print(write_model_card(run))),
    }


def test_every_command_answers_where_nothing_is_broken(runs):
    for kind, run in runs.items():
        for name, command in commands(run, kind).items():
            status, out, err = outcome(command)
            assert (status, bool(out)) == (0, True), (kind, name, err)


def files_of(run: Path) -> list[Path]:
    """The files by which it is used; those of checkpoints have digests and tests of their own."""
    files = sorted(path for path in run.rglob("*") if path.is_file() and "checkpoints" not in path.parts)
    names = {path.name for path in files}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "model.safetensors"} <= names
    return files


def use(run: Path, kind: str, file: Path, content: bytes, names: str, what: object) -> None:
    """These commands of a run whose file holds something else: an answer, or one sentence and status 2."""
    whole = file.read_bytes()
    file.write_bytes(content)
    try:
        for name in names.split():
            shutil.rmtree(run.parent / "eval", ignore_errors=True)
            started = time.process_time()
            status, out, err = outcome(commands(run, kind)[name])
            case = f"{name} of {file.relative_to(run)} with {what}: {status}\n{out}\n{err}"
            errors = [line for line in err.splitlines() if line.startswith("error: ")]
            assert status in (0, 2) and "Traceback" not in err and len(errors) == (status == 2), case
            assert time.process_time() - started < SECONDS, case
    finally:
        file.write_bytes(whole)


EVERY = "eval ask serve resume report card"
USED = st.tuples(
    st.sampled_from(("classify", "sft")),
    st.integers(0, 10**6),
    st.sampled_from(("flip", "flip", "cut", "digit", "type", "gap", *SHAPES)),
    # where: the beginning of a file of weights describes the rest
    st.floats(0, 1, exclude_max=True) | st.floats(0, 0.02),
    st.integers(0, 255),
)


def harm(runs: dict[str, Path], case: tuple[str, int, str, float, int], names: str) -> None:
    kind, number, how, at, byte = case
    files = files_of(runs[kind])
    file = files[number % len(files)]
    content = SHAPES[how] if how in SHAPES else corrupted(file.read_bytes(), how, at, byte)
    use(runs[kind], kind, file, content, names, case)


@settings(max_examples=12, derandomize=True, **HYPOTHESIS)
@given(USED)
def test_a_byte_of_a_model_may_be_another_one(runs, case):
    harm(runs, case, "ask serve card")


@pytest.mark.slow
@settings(max_examples=1500, **HYPOTHESIS)
@given(USED)
def test_any_byte_of_any_file_of_a_model_may_be_another_one(runs, case):
    harm(runs, case, EVERY)


def test_weights_that_are_cut_or_are_none_are_one_sentence_in_every_command(runs):
    for kind, run in runs.items():
        for place in (run / "model" / "adapter_model.safetensors", run / "base_model" / "model.safetensors"):
            whole = place.read_bytes()
            for content in (b"", whole[:4], whole[: len(whole) // 2], b"[" * 1000, b"\xff" * 8 + whole[8:]):
                use(run, kind, place, content, "ask serve card", content[:8])


def test_a_configuration_that_makes_no_model_is_one_sentence(runs):
    place = runs["classify"] / "base_model" / "config.json"
    for key, value in (
        ("hidden_dropout_prob", 9.8),
        ("num_attention_heads", 0),
        ("hidden_size", "x"),
        ("vocab_size", -1),
    ):
        config = json.loads(place.read_text()) | {key: value}
        use(runs["classify"], "classify", place, json.dumps(config).encode(), "eval ask serve", (key, value))
