"""Starts a run on two ranks again and again and kills it at random moments, until it has been killed often enough.

    python tests/distributed/killing.py RECIPE RUN KILLS SEED

A life costs little because its ranks are forked from this process, which has imported everything and computed
nothing. Prints one JSON line: kills, lives, kills with a checkpoint half written, kills before the first step.
"""

import json
import os
import random
import runpy
import signal
import socket
import sys
import time
from pathlib import Path

RANKS = 2
LIFE_SECONDS = 150


def main(recipe: str, run: Path, kills: int, seed: int) -> None:
    """Kill the run `kills` times, then let it end."""
    chance = random.Random(seed)
    seen = {"kills": 0, "lives": 0, "in_a_write": 0, "before_a_step": 0}
    _import_everything()
    while True:
        seen["lives"] += 1
        before = _lines(run)
        log = run.parent / f"life-{seen['lives']}.log"
        ranks = _fork(recipe, log)
        ended = _live(ranks, run, before, chance) if seen["kills"] < kills else _wait(ranks, LIFE_SECONDS)
        if ended is None:
            seen["kills"] += 1
            seen["in_a_write"] += any(run.glob(".lives/*/.step-*.tmp-*"))
            seen["before_a_step"] += _lines(run) <= before
            _kill(ranks, chance)
            continue
        if ended == [0] * RANKS:
            break
        sys.exit(f"a life ended with {ended}\n{log.read_text()}")
    print(json.dumps(seen))


def _import_everything() -> None:
    import isotune.checkpoint.final_model
    import isotune.evaluation.generation.chat
    import isotune.report.loss_curve
    import isotune.training.from_recipe  # noqa: F401


def _lines(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.exists() else 0


def _fork(recipe: str, log: Path) -> list[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(RANKS):
        if child := os.fork():
            ranks.append(child)
            continue
        where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS}
        os.environ.update({name: str(value) for name, value in where.items()})
        os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.argv = ["train/sft_opt.py", "--config", recipe]
        status = 1
        try:
            runpy.run_path("train/sft_opt.py", run_name="__main__")
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
        except BaseException as error:
            print(repr(error), flush=True)
        sys.stdout.flush()
        os._exit(status)
    return ranks


def _live(ranks: list[int], run: Path, before: int, chance: random.Random) -> list[int] | None:
    """Wait for a random moment: during the start, or some time after the first new step. Statuses, if it ended."""
    start = time.monotonic()
    in_start_up = chance.random() < 0.15
    moment = start + chance.uniform(0, 1.5) if in_start_up else None
    while True:
        ended = _ended(ranks)
        if len(ended) == RANKS or any(status != 0 for status in ended.values()):
            return [ended.get(rank, -99) for rank in ranks]
        if moment is None and _lines(run) > before and (run / "status.json").stat().st_mtime > 0:
            moment = time.monotonic() + chance.uniform(0, 0.15)
        if moment is not None and time.monotonic() >= moment:
            return None
        if time.monotonic() - start > LIFE_SECONDS:
            return [-98]
        time.sleep(0.002)


def _ended(ranks: list[int]) -> dict[int, int]:
    found = {}
    for rank in ranks:
        result = os.waitid(os.P_PID, rank, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if result is not None:
            found[rank] = result.si_status
    return found


def _wait(ranks: list[int], seconds: float) -> list[int]:
    deadline = time.monotonic() + seconds
    while len(ended := _ended(ranks)) < RANKS and time.monotonic() < deadline:
        time.sleep(0.01)
    return [ended.get(rank, -99) for rank in ranks]


def _kill(ranks: list[int], chance: random.Random) -> None:
    """SIGKILL to both at once, as when a node dies, or to one, and to the other a moment later, as a launcher does."""
    first, second = chance.sample(ranks, 2)
    os.kill(first, signal.SIGKILL)
    if chance.random() < 0.3:
        time.sleep(chance.uniform(0, 0.1))
    os.kill(second, signal.SIGKILL)
    for rank in ranks:
        os.waitpid(rank, 0)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
