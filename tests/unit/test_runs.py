"""`isotune runs` says of every run what is true of it now, whatever its files say, in 80 columns or in JSON."""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from tests.launching import surroundings_of

from isotune.cli import main
from isotune.commands.listing import list_all
from isotune.commands.runs import WIDTH
from isotune.run.run_lease import ATTEMPT_RECORD, HEARTBEAT, WATCH_SECONDS, Attempt
from isotune.run.run_state import find_runs, state_of_run

HOLDER = """
import sys, time
from pathlib import Path
from isotune.run.run_lease import RunLease
RunLease(Path(sys.argv[1])).acquire()
print("held", flush=True)
time.sleep(60)
"""


def written(run: Path, status: dict[str, Any] | None, lines: list[dict[str, Any]] = [], **recipe: Any) -> Path:  # noqa: B006
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in recipe.items()) or "{}")
    if status is not None:
        (run / "status.json").write_text(json.dumps(status))
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def listed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as leaving:
        main(["runs", *words])
    assert not leaving.value.code
    return capsys.readouterr().out


def test_a_run_is_running_while_its_process_lives_and_killed_afterwards(tmp_path):
    run = written(tmp_path / "run", {"status": "running", "step": 1})
    command = [sys.executable, "-c", HOLDER, str(run)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=surroundings_of())
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    try:
        assert state_of_run(run).state == "running"
        (run / "status.json").write_text('{"status": "preempted"}')  # of the attempt before, until the first step
        assert state_of_run(run).state == "running"
        (run / "status.json").write_text('{"status": "running"}')
    finally:
        holder.kill()
        holder.wait()
    assert state_of_run(run).state == "killed"
    for status in ("preempted", "failed"):
        (run / "status.json").write_text(json.dumps({"status": status, "pid": holder.pid + 1}))
        assert state_of_run(run).state == "killed", "the attempt before says it, and the last one was killed since"
        (run / "status.json").write_text(json.dumps({"status": status, "pid": holder.pid}))
        assert state_of_run(run).state == status


def test_a_run_on_another_machine_runs_as_long_as_its_heart_beats(tmp_path):
    run = written(tmp_path / "run", {"status": "running"})
    folder = run / ".lives" / "00000001-abcd"
    folder.mkdir(parents=True)
    record = asdict(Attempt.current()) | {"host": "node7", "machine": "node7 x y"}
    (folder / ATTEMPT_RECORD).write_text(json.dumps(record))
    (folder / HEARTBEAT).write_text("3 1.0\n")
    assert state_of_run(run).state == "running"
    long_ago = time.time() - WATCH_SECONDS - 5
    os.utime(folder / HEARTBEAT, (long_ago, long_ago))
    assert state_of_run(run).state == "killed"


@pytest.mark.parametrize(
    ("status", "state"),
    [
        (None, "not started"),
        ({"status": "preempted"}, "preempted"),
        ({"status": "finished"}, "finished"),
        ({"status": "failed"}, "failed"),
        ({"status": "running"}, "killed"),
        ([1], "killed"),  # it had begun, and nobody can tell how it ended
    ],
)
def test_the_state_of_a_run_without_a_process_is_how_it_ended(tmp_path, status, state):
    assert state_of_run(written(tmp_path / "run", status)).state == state


def test_progress_and_best_metric_are_those_of_the_metrics(tmp_path):
    lines = [{"step": n, "loss": 1.0} for n in range(1, 8)]
    lines += [{"step": 3, "eval_loss": 0.5, "eval_accuracy": 0.7}, {"step": 6, "eval_loss": 0.6, "eval_accuracy": 0.9}]
    run = written(tmp_path / "a", {"status": "failed", "step": 4, "steps": 60}, lines)
    state = state_of_run(run)
    assert (state.step, state.steps, state.metric, state.best, state.best_step) == (7, 60, "eval_loss", 0.5, 3)
    run = written(tmp_path / "b", {"status": "failed"}, lines, metric_for_best_model="eval_accuracy", max_steps=70)
    state = state_of_run(run)
    assert (state.steps, state.metric, state.best, state.best_step) == (70, "eval_accuracy", 0.9, 6)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')  # what a kill leaves
    assert state_of_run(run).step == 7


def test_the_age_is_the_time_since_a_file_of_the_run_changed(tmp_path):
    run = written(tmp_path / "run", {"status": "finished"})
    for file in run.iterdir():
        os.utime(file, (1000, 1000))
    os.utime(run / "metrics.jsonl", (5000, 5000))
    assert state_of_run(run, now_seconds=5000 + 7200).age_seconds == 7200


def test_runs_are_found_at_any_depth_and_a_run_holds_no_other(tmp_path):
    one = written(tmp_path / "sweep" / "deep" / "trial-1", {"status": "finished"})
    written(one / "eval" / "inner", {"status": "finished"})
    written(tmp_path / ".hidden" / "x", {"status": "finished"})
    two = written(tmp_path / "two", None)
    (tmp_path / "loop").symlink_to(tmp_path)
    assert find_runs([tmp_path]) == [one, two]
    assert find_runs([two, tmp_path]) == [two, one]


def test_a_recipe_of_the_users_own_hides_no_run_below_it(tmp_path):
    (tmp_path / "recipe.yaml").write_text("seed: 1\n")
    run = written(tmp_path / "runs" / "a", {"status": "finished", "step": 1})
    assert run in find_runs([tmp_path])


def test_the_table_fits_a_terminal_of_80_columns(tmp_path, capsys):
    lines = [{"step": 1_234_567, "eval_loss": 0.123456, "loss": 1.0}]
    for number, status in enumerate(("finished", "running", "preempted")):
        name = f"a_run_with_a_long_name_{number}" * 3
        written(tmp_path / name, {"status": status, "steps": 2_000_000}, lines)
    written(tmp_path / "odd", {"status": "fin\x1b[31m\nished"})
    out = listed(capsys, str(tmp_path))
    head, *rows = out.splitlines()
    assert head.split() == ["run", "state", "step", "best", "metric", "age"] and len(rows) == 4
    assert all(len(line) <= WIDTH for line in (head, *rows)) and "\x1b" not in out
    assert rows[1].split()[1:] == ["killed", "1,234,567", "of", "2,000,000", "loss", "0.1235", "0", "s"]
    assert all("…" in row for row in rows[:3])


def test_json_has_every_value_and_the_whole_name(tmp_path, capsys):
    run = written(tmp_path / "run", {"status": "running", "step": 2, "message": None}, task="sft")
    (entry,) = json.loads(listed(capsys, str(tmp_path), "--json"))
    assert entry.pop("age_seconds") < 60
    assert entry == {
        "run": str(run), "state": "killed", "task": "sft", "step": 2, "steps": None, "metric": None, "best": None,
        "best_step": None, "message": None,
    }  # fmt: skip


def test_no_run_and_no_folder_are_said(tmp_path, capsys):
    assert listed(capsys, str(tmp_path)) == f"no run below {tmp_path}\n"
    with pytest.raises(SystemExit) as leaving:
        main(["runs", str(tmp_path / "nowhere")])
    assert leaving.value.code == 2
    assert capsys.readouterr().err == f"error: there is no folder {tmp_path / 'nowhere'}\n"


def test_a_run_that_is_a_link_is_listed_and_a_circle_ends(tmp_path):
    disk, runs = tmp_path / "disk", tmp_path / "runs"
    run = written(disk / "a", {"status": "finished"})
    (disk / "of another").mkdir()
    (runs / "group").mkdir(parents=True)
    links = [runs / "group" / "linked", runs / "mine"]
    for link in links:
        link.symlink_to(run)
    (runs / "group" / "circle").symlink_to(runs)
    (runs / "data").symlink_to(disk / "of another")
    (runs / "gone").symlink_to(disk / "gone")
    assert sorted(find_runs([runs])) == links
    assert find_runs([links[0]]) == [links[0]]


def test_a_name_that_is_not_utf_8_is_a_line_of_both_lists(tmp_path, capsys):
    run = written(tmp_path / os.fsdecode(b"caf\xe9"), {"status": "finished", "step": 1})
    assert "caf? " in listed(capsys, str(tmp_path))
    list_all(["runs"], tmp_path)
    assert f"  {tmp_path}/caf?  " in capsys.readouterr().out.encode().decode() and run.is_dir()
