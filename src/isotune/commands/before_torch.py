"""What a run does before it imports torch, which takes seconds and reads the settings of its threads once."""

import os
import sys
from collections.abc import MutableMapping

from isotune.run.malloc_tuning import GPU_DRIVERS

WAIT_POLICY, SPIN_COUNT = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"
SPINS = "2000"  # of a waiting thread before it sleeps; 300,000 by default (benchmarks/idle_threads.py)


def before_torch(*, quiet: bool = False) -> None:
    """Let idle threads sleep, and say once on this machine that it is loading; nothing where torch is there already."""
    if "torch" in sys.modules:
        return
    let_idle_threads_sleep(os.environ)
    if not quiet and os.environ.get("LOCAL_RANK", "0") == "0":
        print("loading     torch and transformers ...", flush=True)


def let_idle_threads_sleep(environment: MutableMapping[str, str]) -> None:
    """Without a GPU: OpenMP's threads soon sleep while they wait, unless the user has said how they wait.

    By default they spin for long, which takes the cores from whoever else has work on them, as other runs on a busy
    machine or other ranks. A few spins cost next to nothing there, and save the waking on a quiet one.
    """
    if not any(driver.exists() for driver in GPU_DRIVERS) and WAIT_POLICY not in environment:
        environment.setdefault(SPIN_COUNT, SPINS)
