"""benchmarks/kills.py sees what it is there to see: one bit, a lie of status.json, half a write."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save
from tests.conftest import REPOSITORY

from isotune.checkpoint.manifest import Manifest, record_file

STEPS = 3


@pytest.fixture(scope="module")
def kills() -> Any:
    """The package benchmarks/kills with its modules."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(REPOSITORY / "benchmarks")
        import kills.checks
        import kills.drawing
        import kills.harm
        import kills.record
        import kills.tripwire
    return kills


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a finished run of three steps, as far as the benchmark looks at it."""
    run = tmp_path / "run"
    checkpoint = run / "checkpoints" / "step-00000003"
    for folder in (run / "model", checkpoint / "tensors"):
        folder.mkdir(parents=True)
    for name in ("recipe.yaml", "environment.json", "loss_curve.png", "model/config.json", "model/README.md"):
        (run / name).write_text("{}")
    weight, moment = np.arange(20, dtype=np.float32), np.arange(30, dtype=np.float32)
    (run / "model" / "model.safetensors").write_bytes(save({"weight": weight}))
    (checkpoint / "tensors" / "shard-00001.safetensors").write_bytes(save({"weight": weight, "z moment": moment}))
    (checkpoint / "state.json").write_text('{"step": 3, "evaluation_due": false}')
    lines = [{"step": step, "loss": 2.0 - 0.1 * step, "step_seconds": 0.5} for step in (1, 2, 3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = tuple(record_file(checkpoint, path) for path in sorted(checkpoint.rglob("*")) if path.is_file())
    Manifest(
        step=STEPS, world_size=1, engine="plain", recipe={}, data_fingerprints={}, recipe_fingerprint="", contents={},
        versions={}, best_step=None, best_metric=None, files=files,
    ).write(checkpoint)  # fmt: skip
    say(run, "finished", STEPS)
    return run


def say(run: Path, status: str, step: int, **more: Any) -> None:
    (run / "status.json").write_text(json.dumps({"status": status, "step": step, "steps": STEPS, **more}))


def flip(file: Path, byte: int) -> None:
    content = bytearray(file.read_bytes())
    content[byte] ^= 1
    file.write_bytes(content)


def next_number(file: Path) -> None:
    file.write_text(file.read_text().replace('"loss": 1.8', '"loss": 1.8000000000000003'))


CHANGES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "model/model.safetensors: weight": ("model/model.safetensors", lambda file: flip(file, -1)),
    "step-00000003/tensors/shard-00001.safetensors: z moment": (
        "checkpoints/step-00000003/tensors/shard-00001.safetensors",
        lambda file: flip(file, -120),
    ),
    "step-00000003/state.json: step": ("checkpoints/step-00000003/state.json", lambda file: flip(file, 9)),
    "metrics.jsonl, line 2": ("metrics.jsonl", next_number),
}


@pytest.mark.parametrize("name", CHANGES)
def test_one_bit_is_a_difference_and_its_name_is_said(kills, run, tmp_path, name):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    (other / "model" / "README.md").write_text("made elsewhere")
    (other / "checkpoints/step-00000003/state.json").write_text('{"step": 3, "evaluation_due": true}')
    (other / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text().replace("0.5", "0.7"))
    expected = kills.checks.result_of(run)
    assert kills.checks.differences(kills.checks.result_of(other), expected) == [], (
        "times, the card and whether an evaluation came after the checkpoint may differ"
    )
    file, change = CHANGES[name]
    change(other / file)
    assert kills.checks.differences(kills.checks.result_of(other), expected) == [name]


def test_a_harmed_checkpoint_differs_in_one_bit_or_is_shorter(kills, run):
    checkpoint = run / "checkpoints" / "step-00000003"
    before = {path: path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()}
    bits = lambda content: int.from_bytes(content, "little")  # noqa: E731
    for place in (0.0, 0.3, 0.6, 0.99):
        kills.harm.harm_newest(run, "flipped byte", place)
        (changed,) = [path for path in before if path.read_bytes() != before[path]]
        assert (bits(changed.read_bytes()) ^ bits(before[changed])).bit_count() == 1
        changed.write_bytes(before[changed])
        kills.harm.harm_newest(run, "truncated", place)
        (changed,) = [path for path in before if path.read_bytes() != before[path]]
        assert before[changed].startswith(changed.read_bytes())
        changed.write_bytes(before[changed])


def test_what_is_drawn_depends_on_the_seed_and_the_number_alone_and_reaches_every_phase_and_kind(kills):
    drawing = kills.drawing
    plans = [drawing.draw_run(5, number) for number in range(300)]
    assert plans == [drawing.draw_run(5, number) for number in range(300)]
    assert plans[0] != drawing.draw_run(6, 0)
    every = [kill for plan in plans for kill in plan.kills]
    of_launches = {(kill.phase, kill.kind) for kill in every if kill.phase != "export"}
    assert of_launches == {(p, k) for p in drawing.PHASES if p != "export" for k in drawing.KINDS}
    assert {kill.harm for kill in every} == {None, *drawing.HARMS}
    for plan in plans:
        order = [kill.phase in drawing.LATE for kill in plan.kills if kill.phase != "export"]
        assert order == sorted(order), "nothing of training is left after the end of training"
        assert all(kill.kind != "launcher" and kill.rank == 0 for kill in plan.kills if plan.engine == "plain")


def ended(kills: Any, kind: str | None = None, **values: Any) -> Any:
    kill = kind and kills.drawing.Kill("step", kind, 0, 0.5, False, 0.1, None, 0.5)
    reached = {"rank": 0} if kill else None
    facts = {"exit_status": -9 if kill else 0, "is_launched": False, "attempts_before": set(), "status_before": None}
    return kills.checks.Ended(kill, reached, **{**facts, **values})


def test_a_status_that_is_not_so_is_named(kills, run):
    checks = kills.checks
    assert checks.untruths(run, ended(kills), STEPS) == []
    (run / "loss_curve.png").unlink()
    assert checks.untruths(run, ended(kills), STEPS) == ["finished without loss_curve.png"]
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 3, "loss": 1.0}\n')
    assert checks.untruths(run, ended(kills), STEPS) == ["finished without loss_curve.png, all lines of its steps"]
    say(run, "running", STEPS)
    assert checks.untruths(run, ended(kills), STEPS) == ["exit status 0, and the state is killed"]
    shutil.rmtree(run / "model")
    say(run, "preempted", 2)
    assert checks.untruths(run, ended(kills, "SIGTERM", exit_status=75), STEPS) == [
        "preempted after step 2, and the newest checkpoint is of step 3"
    ]
    say(run, "running", 4)
    assert checks.untruths(run, ended(kills, "SIGKILL one"), STEPS) == [
        "status.json says step 4, and the newest checkpoint is of step 3"
    ]
    say(run, "preempted", 3)
    (run / ".lives" / "00000001-ab").mkdir(parents=True)
    assert checks.untruths(run, ended(kills, "SIGKILL one"), STEPS) == [
        "its main process was killed, and the state is preempted"
    ]
    (run / "status.json").write_text('{"status": "fin')
    assert checks.untruths(run, ended(kills, "SIGKILL one"), STEPS) == ["status.json is not JSON"]


def test_a_kill_inside_a_write_leaves_half_of_it(kills, tmp_path):
    run, report = tmp_path / "run", tmp_path / "reached.json"
    run.mkdir()
    kill = kills.drawing.Kill("status.json", "SIGKILL one", 0, 0.5, False, 0.1, None, 0.5)
    child = os.fork()
    if child == 0:
        kills.tripwire.Tripwire(run, kill, number=2, delay_seconds=0.0, report=report).install(0)
        (run / "recipe.yaml").write_text("another file is no event of this phase")
        (run / "status.json").write_text("0123456789")  # the events: open, half the write
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert (run / "status.json").read_text() == "01234"
    assert json.loads(report.read_text())["event"] == "half a write to RUN/status.json"
    assert (run / "recipe.yaml").read_text() == "another file is no event of this phase"


def test_a_run_without_its_end_is_not_counted_and_the_table_counts_the_others(kills, tmp_path):
    record = kills.record.Record(tmp_path / "kills-0.jsonl")
    line = {"engine": "ddp", "phase": "step", "kind": "SIGTERM", "reached": {}, "untruths": [], "harm_done": None}
    line["exit_status"] = 1
    for run, attempt in ((0, 1), (0, 2), (1, 1)):
        record.add({**line, "run": run, "attempt": attempt})
    record.add({"run": 0, "result": "equal", "problems": []})
    again = kills.record.Record(tmp_path / "kills-0.jsonl")
    assert len(again.kills) == len(record.kills) == 2
    assert "| step | 0 | 0 | 2 | 0 | 0 | 1 | 1 | 2 | 0 |" in kills.record.table(again)
    again.add({"run": 1, "result": "different", "problems": ["differs"]})
    assert "| all | 0 | 0 | 3 | 0 | 0 | 2 | 1 | 3 | 1 |" in kills.record.table(again)
    again.add({**line, "run": 1, "attempt": 1, "exit_status": None})
    assert "| step | 0 | 0 | 3 | 0 | 0 | 2 | 1 | 3 | 2 |" in kills.record.table(again), "one hung"
    page = tmp_path / "page.md"
    page.write_text(f"before\n{kills.record.BEGIN}old\n{kills.record.END}after\n")
    kills.record.write_table(page, "new\n")
    assert page.read_text() == f"before\n{kills.record.BEGIN}new\n{kills.record.END}after\n"
