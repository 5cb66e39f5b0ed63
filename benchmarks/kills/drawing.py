"""What is done to a run: drawn from a seed and the run's number alone, so that the two repeat it."""

import random
from dataclasses import dataclass

ENGINES = {"plain": "", "ddp": "ddp.yaml", "zero2": "zero2.yaml", "fsdp2": "fsdp2.yaml"}
RANKS = 2  # of every engine but plain

# by what they need of the run: nothing, steps that are left to do, the end of training, a finished run
EARLY = ("start", "preparation", "run files")
TRAINING = (
    "step", "evaluation", "checkpoint files", "manifest", "publication", "metrics.jsonl", "status.json",
)  # fmt: skip
LATE = ("model", "finishing")
EXPORT = "export"
PHASES = (*EARLY, *TRAINING, *LATE, EXPORT)
BY_TIME = ("start", "preparation", "step", "evaluation")  # the other phases are writes, and killed at one of them

ONE, ALL, TERM, STOPPED, LAUNCHER = "SIGKILL one", "SIGKILL all", "SIGTERM", "SIGSTOP", "launcher"
KINDS = (ONE, ALL, TERM, STOPPED, LAUNCHER)
OF_ONE_PROCESS = (ONE, TERM, STOPPED)
TRUNCATED, FLIPPED, FULL_DISK = "truncated", "flipped byte", "full disk"
HARMS = (TRUNCATED, FLIPPED, FULL_DISK)


@dataclass(frozen=True)
class Kill:
    """One attempt's end, and what is done to the run before it.

    Attributes:
        place: of the kill within its phase, from 0 to 1.
        at_launcher: SIGTERM goes to the launcher, as a scheduler's does, instead of the rank.
        pause_seconds: between SIGSTOP and SIGKILL.
        harm: before the attempt: to the newest checkpoint, or an attempt on a full disk.
        harm_place: which file and byte, or how much room is left, from 0 to 1.
    """

    phase: str
    kind: str
    rank: int
    place: float
    at_launcher: bool
    pause_seconds: float
    harm: str | None
    harm_place: float


@dataclass(frozen=True)
class RunPlan:
    """A run, and the kills of its attempts in their order."""

    number: int
    engine: str
    kills: tuple[Kill, ...]


def draw_run(seed: int, number: int) -> RunPlan:
    """The plan of a run. Engines take turns; phases that need a later state of the run come later."""
    chance = random.Random(f"{seed} {number}")
    engine = list(ENGINES)[number % len(ENGINES)]
    phases = [chance.choice(EARLY) for _ in range(chance.randint(0, 2))]
    phases += [chance.choice(TRAINING) for _ in range(chance.randint(2, 4))]
    chance.shuffle(phases)
    phases += sorted((chance.choice(LATE) for _ in range(chance.randint(0, 2))), key=LATE.index)
    phases += [EXPORT] * chance.randint(0, 1)
    return RunPlan(number, engine, tuple(_draw_kill(chance, phase, engine) for phase in phases))


def _draw_kill(chance: random.Random, phase: str, engine: str) -> Kill:
    is_launched = engine != "plain" and phase != EXPORT
    kind = chance.choice(KINDS if is_launched else OF_ONE_PROCESS)
    harm = chance.choice(HARMS) if chance.random() < 0.25 else None
    return Kill(
        phase=phase,
        kind=kind,
        rank=chance.randrange(RANKS) if is_launched else 0,
        place=chance.random(),
        at_launcher=chance.random() < 0.5,
        pause_seconds=chance.uniform(0.05, 1.5),
        harm=harm if phase not in (*LATE, EXPORT) else None,
        harm_place=chance.random(),
    )
