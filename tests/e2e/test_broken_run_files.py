"""Whatever becomes of a file of a run, each command gives its answer or one sentence with exit status 2."""

import json
import os
import random
import shutil
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tests.launching import TINY_CLASSIFIER, start

from isotune.checkpoint.manifest import MANIFEST, _digest
from isotune.checkpoint.resume import open_run
from isotune.checkpoint.store import CheckpointStore
from isotune.cli import main
from isotune.config import ClassificationRecipe
from isotune.distributed.launch import Process
from isotune.evaluation.results import write_result
from isotune.evaluation.statistics.resampling import Scores
from isotune.io.errors import run_script
from isotune.report.job import job_report
from isotune.report.model_card import write_model_card

ALONE = Process(0, 1, torch.device("cpu"))

RECIPE = TINY_CLASSIFIER | {"max_steps": 2, "save_steps": 1}
ROWS = 12
SECONDS = 5.0  # that no command may take, on files of a few kilobytes
SHAPES: dict[str, bytes] = {
    "nothing": b"",
    "a list": b"[1]",
    "a number": b"7",
    "a text": b'"x"',
    "a null": b"null",
    "brackets": b"[" * 100_000,
    "braces": b'{"a":' * 100_000,
    "cut UTF-8": b'{"status": "\xe4\xbd',
    "a byte order mark": b"\xef\xbb\xbf{}",
    "NUL": b"\0" * 50,
    "no keys": b"{}",
    "many digits": b'{"step": ' + b"9" * 5000 + b"}",
    "an alias bomb": b"a: &a [x, x, x, x, x, x, x, x, x]\n"
    + b"".join(b"%c: &%c [%s]\n" % (n, n, b", ".join([b"*%c" % (n - 1)] * 9)) for n in range(ord("b"), ord("k"))),
}


def evaluated(run: Path, right: int) -> None:
    """An evaluation of two classes, of which the first `right` rows are right."""
    rows = [
        {"id": n, "label": n % 2, "probabilities": [0.25, 0.75] if (n < right) == (n % 2 == 1) else [0.75, 0.25]}
        for n in range(ROWS)
    ]
    facts = {"kind": "classification", "model": "m", "dataset_name": "d", "dataset_split": "test"}
    facts |= {"label_names": ["bad", "good"], "task_type": "single_label"}
    scores = Scores({"accuracy": right / ROWS}, {"accuracy": (0.1, 0.9)})
    write_result(run / "eval" / "test", facts, scores, rows, ["text"] * ROWS)
    (run / "eval" / "test" / "examples.jsonl").write_text(
        '{"id": 0, "actual": "bad", "predicted": "good", "text": "fine"}\n'
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A finished run with checkpoints and an evaluation, and another beside it."""
    folder = tmp_path_factory.mktemp("runs")
    run = start(folder, RECIPE, script="train/imdb.py").run
    evaluated(run, 8)
    (run / "upload.json").write_text('{"repository": "me/run", "url": "u", "commit": "c"}')
    shutil.copytree(run, folder / "other")
    evaluated(folder / "other", 5)
    return [run, folder / "other"]


def outcome(call: Callable[[], Any]) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a script with this body; whatever else it raises fails the test."""
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            call()
            status = 0
        except SystemExit as leaving:
            status = int(leaving.code or 0)
    return status, out.getvalue(), err.getvalue()


# which commands read a file, beside those that read every one of them
READERS = {
    "recipe.yaml": "report card runs ls export", "environment.json": "report card job start",
    "status.json": "report job runs start", "metrics.jsonl": "report card job runs", "upload.json": "start",
    "eval/test/metrics.json": "reports compare", "eval/test/predictions.jsonl": "reports compare",
    "eval/test/examples.jsonl": "report", ".lives/00000001-*/life.json": "job runs start",
    ".lives/00000001-*/heartbeat": "job runs", "model/config.json": "export",
}  # fmt: skip


def check_all(runs: list[Path], what: object, names: str, *, timed: bool = True) -> None:
    """These commands on the first of the runs: an answer, or one sentence and status 2."""
    run, other = map(str, runs)
    recipe = ClassificationRecipe.from_values(**{**RECIPE, "output_dir": run, "push_to_hub": True})
    commands: dict[str, Callable[[], Any]] = {
        "report": lambda: main(["report", run, "--output", f"{run}/../page.html"]),
        "reports": lambda: main(["report", run, other, "--output", f"{run}/../page.html"]),
        "compare": lambda: main(["compare", run, other, "--resamples", "100", "--name", "test"]),
        "job": lambda: run_script(lambda: print(job_report(runs[0]))),
        "runs": lambda: main(["runs", run]),
        "ls": lambda: main(["ls", "runs", "--output_dir", f"{run}/.."]),
        "start": lambda: run_script(lambda: open_run(recipe, ALONE) and None),
        "card": lambda: run_script(lambda: print(write_model_card(run))),
    }
    exported = runs[0].parent / "exported"
    shutil.rmtree(exported, ignore_errors=True)
    commands["export"] = lambda: main(["export", run, "--output", str(exported)])
    for name in names.split():
        started = time.process_time()
        status, out, err = outcome(commands[name])
        assert not timed or time.process_time() - started < SECONDS, (name, what)
        case = f"{name} of {what}: {status}\n{out}\n{err}"
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        assert status in (0, 2) and "Traceback" not in err, case
        assert len(errors) == (status == 2) and (bool(out) or status == 2 or name == "start"), case


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """An upload that is tried again ends at once."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def the(run: Path, pattern: str) -> Path:
    return next(iter(sorted(run.glob(pattern))))


def test_every_command_answers_where_nothing_is_broken(runs):
    every = {word for words in READERS.values() for word in words.split()}
    check_all(runs, "a whole run", " ".join(sorted(every)), timed=False)  # the first call of each imports its libraries
    assert outcome(lambda: main(["compare", *map(str, runs), "--resamples", "100", "--name", "test"]))[0] == 0


@pytest.mark.parametrize("name", READERS)
def test_a_file_of_another_shape_is_one_sentence_or_passed_over(runs, name):
    file = the(runs[0], name)
    whole = file.read_bytes()
    try:
        for shape, content in SHAPES.items():
            file.write_bytes(content)
            check_all(runs, f"{name} with {shape}", READERS[name])
        file.unlink()
        os.mkfifo(file)
        check_all(runs, f"{name} as a pipe", READERS[name])
        file.unlink()
        file.mkdir()
        check_all(runs, f"{name} as a folder", READERS[name])
        file.rmdir()
        check_all(runs, f"no {name}", READERS[name])
    finally:
        if file.is_dir():
            file.rmdir()
        file.unlink(missing_ok=True)
        file.write_bytes(whole)


def corrupted(content: bytes, how: str, at: float, byte: int) -> bytes:
    place = int(at * len(content))
    if how == "flip":
        return content[:place] + bytes([content[place] ^ (byte or 1)]) + content[place + 1 :] if content else b"\x01"
    if how == "cut":
        return content[:place]
    if how == "digit":  # every number from here on is another one
        return content[:place] + content[place:].translate(bytes.maketrans(b"0123456789", b"9876543210"))
    if how == "type":
        return content[:place] + content[place:].replace(b'"', b"", 2)
    return content[:place] + content[place + byte :]


HARM = st.tuples(
    st.sampled_from(list(READERS)),
    st.sampled_from(("flip", "flip", "cut", "digit", "type", "gap")),
    st.floats(0, 1, exclude_max=True),
    st.integers(0, 255),
)


# the smallest case would say little more, and takes minutes
PHASES = [Phase.explicit, Phase.generate]
HYPOTHESIS: Any = {"deadline": None, "suppress_health_check": list(HealthCheck), "phases": PHASES}


def harm(runs: list[Path], case: tuple[str, str, float, int]) -> None:
    name, how, at, byte = case
    file = the(runs[0], name)
    whole = file.read_bytes()
    try:
        file.write_bytes(corrupted(whole, how, at, byte))
        check_all(runs, case, READERS[name])
    finally:
        file.write_bytes(whole)


@settings(max_examples=20, derandomize=True, **HYPOTHESIS)
@given(HARM)
def test_a_byte_of_any_file_may_be_another_one(runs, case):
    harm(runs, case)


@pytest.mark.slow
@settings(max_examples=600, **HYPOTHESIS)
@given(HARM)
def test_any_byte_of_any_file_may_be_another_one(runs, case):
    harm(runs, case)


class TestManifests:
    """The search for a checkpoint passes over what is none."""

    def sealed(self, **changes: Any) -> bytes:
        """A manifest whose own digest is right, and which holds something else."""
        content = {"format": 1, **changes}
        return json.dumps({**content, "digest": _digest(content)}).encode()

    def test_a_manifest_of_any_shape_is_passed_over_with_the_reason(self, runs, tmp_path):
        store = CheckpointStore(tmp_path / "checkpoints")
        shutil.copytree(runs[0] / "checkpoints", store.path)
        last, manifest = store.folders()[-1], store.folders()[-1] / MANIFEST
        whole = json.loads(manifest.read_bytes())
        del whole["digest"]
        shapes = SHAPES | {
            "only a format": self.sealed(),
            "files of numbers": self.sealed(**whole | {"files": [1, 2]}),
            "a step of text": self.sealed(**whole | {"step": "2"}),
            "a huge step": self.sealed(**whole | {"step": 10**400}),
            "an unknown key": self.sealed(**whole, surprise=1),
        }
        for shape, content in shapes.items():
            manifest.write_bytes(content)
            newest = store.newest_valid()
            assert newest.folder == store.folders()[-2], shape
            ((folder, why),) = newest.skipped
            assert folder == last and why and "\n" not in why, shape
        manifest.write_bytes(self.sealed(**whole))
        assert store.newest_valid().folder == last

    def test_any_byte_of_a_manifest_counts(self, runs, tmp_path):
        store = CheckpointStore(tmp_path / "checkpoints")
        shutil.copytree(runs[0] / "checkpoints", store.path)
        manifest = store.folders()[-1] / MANIFEST
        whole = manifest.read_bytes()
        chance = random.Random(0)
        for _ in range(100):
            place = chance.randrange(len(whole))
            byte = whole[place] ^ (1 << chance.randrange(8))
            manifest.write_bytes(whole[:place] + bytes([byte]) + whole[place + 1 :])
            newest = store.newest_valid()
            if newest.folder == store.folders()[-1]:  # one white space for another
                assert json.loads(manifest.read_bytes()) == json.loads(whole)
