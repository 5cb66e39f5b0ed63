"""What a run does before it imports torch, which takes seconds and reads the settings of its threads once."""

import os
import sys
from collections.abc import MutableMapping

from isotune.run.malloc_tuning import GPU_DRIVERS

WAIT_POLICY = "OMP_WAIT_POLICY"


def before_torch(*, quiet: bool = False) -> None:
    """Let idle threads sleep, and say once on this machine that it is loading; nothing where torch is there already."""
    if "torch" in sys.modules:
        return
    let_idle_threads_sleep(os.environ)
    if not quiet and os.environ.get("LOCAL_RANK", "0") == "0":
        print("loading     torch and transformers ...", flush=True)


def let_idle_threads_sleep(environment: MutableMapping[str, str]) -> None:
    """Without a GPU: OpenMP's threads wait for work asleep, unless the user has said how they wait.

    By default they spin, which takes the cores from whoever else has work on them, as other runs on a busy machine or
    other ranks: a small run then takes many times as long (docs/benchmarks.md).
    """
    if not any(driver.exists() for driver in GPU_DRIVERS):
        environment.setdefault(WAIT_POLICY, "PASSIVE")
