"""What a run has come to, and whether its files say the truth about it."""

import contextlib
import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors

from isotune.checkpoint.store import CheckpointStore
from isotune.commands.runs import list_runs
from kills.drawing import ALL, LAUNCHER, ONE, STOPPED, TERM, Kill

TIMED = {"step_seconds", "tokens_per_second", "peak_memory_bytes", "eval_seconds"}
PLACE = {"evaluation_due", "epoch_end_done"}  # of a checkpoint within its step, where a stop was asked for
CARD = "README.md"


def result_of(run: Path) -> dict[str, str]:
    """What must be the same whatever happened to a run, by name: its model, its lines, its last training state.

    The model card is left out: it names the run's folder, and times.
    """
    found = {"loss_curve.png": _digest(run / "loss_curve.png")}
    for path in sorted((run / "model").iterdir()):
        if path.name != CARD:
            found |= _digests(f"model/{path.name}", path)
    for number, line in enumerate((run / "metrics.jsonl").read_text().splitlines(), start=1):
        values = {key: value for key, value in json.loads(line).items() if key not in TIMED}
        found[f"metrics.jsonl, line {number}"] = json.dumps(values, sort_keys=True)
    last = CheckpointStore(run / "checkpoints").folders()[-1]
    for path in sorted((last / "tensors").iterdir()):
        found |= _digests(f"{last.name}/tensors/{path.name}", path)
    state = json.loads((last / "state.json").read_text())
    return found | {f"{last.name}/state.json: {key}": json.dumps(state[key]) for key in state if key not in PLACE}


def files_of(folder: Path) -> dict[str, str]:
    """The digest of every file below a folder."""
    return {str(path.relative_to(folder)): _digest(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def differences(found: dict[str, str], expected: dict[str, str]) -> list[str]:
    """The names under which two results differ; empty where they are the same to the bit."""
    return [name for name in sorted({*found, *expected}) if found.get(name) != expected.get(name)]


def left_over(run: Path) -> list[str]:
    """What a finished run should not hold any more: anything half written, or set aside."""
    unfinished = [*run.glob("*.unverified"), *run.glob("*.before"), *run.glob("checkpoints/.*"), *run.glob(".*.tmp")]
    unfinished += [path for path in run.glob(".lives/*/*") if path.is_dir()] + [*run.glob("export/.*")]
    unfinished += [*run.glob("export/*.unverified"), *run.glob("export/*.before")]
    return sorted(str(path.relative_to(run)) for path in unfinished)


@dataclass(frozen=True)
class Ended:
    """An attempt that is over, as its starter saw it.

    Attributes:
        kill: that was drawn for it; None for an attempt that was left alone.
        reached: what the process wrote down before the kill; None where the event did not come.
        exit_status: of the launcher, or of the one process; negative for a signal.
        attempts_before: folders of attempts in RUN before it began.
        status_before: RUN/status.json then.
    """

    kill: Kill | None
    reached: dict[str, Any] | None
    exit_status: int | None
    is_launched: bool
    attempts_before: set[str]
    status_before: bytes | None


def attempts_of(run: Path) -> set[str]:
    """The names of the attempts that RUN knows of."""
    folder = run / ".lives"
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    return {name.removesuffix(".over") for name in names if not name.startswith(".")}


def status_of(run: Path) -> bytes | None:
    """RUN/status.json as it is; None where there is none."""
    file = run / "status.json"
    return file.read_bytes() if file.is_file() else None


def told_of(run: Path) -> str:
    """The state that `isotune runs` prints of a run; `absent` where it lists none."""
    printed = io.StringIO()
    if not run.is_dir():
        return "absent"
    with contextlib.redirect_stdout(printed):
        list_runs([str(run)], as_json=True)
    with contextlib.suppress(json.JSONDecodeError):
        return next(iter(json.loads(printed.getvalue())), {"state": "absent"})["state"]
    return "absent"


def untruths(run: Path, ended: Ended, steps: int) -> list[str]:
    """What status.json or `isotune runs` say of a run that is not so; empty where all is true."""
    state, raw = told_of(run), status_of(run)
    try:
        status: dict[str, Any] = {} if raw is None else json.loads(raw)
    except json.JSONDecodeError:
        return ["status.json is not JSON"]
    is_new = raw != ended.status_before  # else it is what an earlier attempt wrote
    found: list[str] = []
    if state == "running":
        found.append("isotune runs: running, and no process is left")
    lacks = missing(run, steps)
    if state == "finished" and lacks:
        found.append(f"finished without {', '.join(lacks)}")
    if ended.exit_status == 0 and state != "finished":
        found.append(f"exit status 0, and the state is {state}")
    if is_new and status.get("status") in ("running", "preempted") and not _is_trained(run):
        newest = CheckpointStore(run / "checkpoints").newest_valid().manifest
        at = newest.step if newest is not None else 0
        if status["step"] > at:
            found.append(f"status.json says step {status['step']}, and the newest checkpoint is of step {at}")
        if status["status"] == "preempted" and status["step"] != at:
            found.append(f"preempted after step {status['step']}, and the newest checkpoint is of step {at}")
    if is_new and status.get("status") == "failed" and not status.get("message"):
        found.append("failed without a message")
    return found + _about_kill(run, ended, state, is_new)


def _about_kill(run: Path, ended: Ended, state: str, is_new: bool) -> list[str]:
    kill = ended.kill
    if kill is None or ended.reached is None:
        return []
    began = bool(attempts_of(run) - ended.attempts_before)
    is_main = not ended.is_launched or ended.reached["rank"] == 0
    is_killed = kill.kind == ALL or (kill.kind in (ONE, STOPPED) and is_main)
    if is_killed and began and state not in ("killed", "finished"):
        return [f"its main process was killed, and the state is {state}"]
    if kill.kind in (TERM, LAUNCHER) and began and is_new and state == "failed":
        return [f"told to stop, and the state is {state}"]
    return []


def missing(run: Path, steps: int) -> list[str]:
    """What a finished run must have, and this one has not."""
    lacks = [name for name in ("recipe.yaml", "environment.json", "loss_curve.png") if not (run / name).is_file()]
    lacks += [f"model/{name}" for name in ("config.json", CARD) if not (run / "model" / name).is_file()]
    lacks += [] if [*(run / "model").glob("*.safetensors")] else ["the weights"]
    lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").is_file() else []
    done = [line for line in map(_parsed, lines) if "loss" in line]
    return lacks + ([] if [line["step"] for line in done] == [*range(1, steps + 1)] else ["all lines of its steps"])


def _parsed(line: str) -> dict[str, Any]:
    with contextlib.suppress(json.JSONDecodeError):
        return json.loads(line)
    return {}


def _is_trained(run: Path) -> bool:
    return (run / "model").is_dir()


def _digests(name: str, path: Path) -> dict[str, str]:
    """The digest of a file, or of each tensor in it: the order of the words in a header is no result."""
    if path.suffix != ".safetensors":
        return {name: _digest(path)}
    found = {}
    for tensor, content in safetensors.deserialize(path.read_bytes()):
        of_form = f"{content['dtype']} {content['shape']} ".encode()
        found[f"{name}: {tensor}"] = hashlib.sha256(of_form + bytes(content["data"])).hexdigest()
    return found


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "a folder"
