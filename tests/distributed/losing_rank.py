"""Runs a script whose rank 1 sends a signal at its second batch: `losing_rank.py SIGNAL PROCESS SCRIPT ARGUMENT...`.

PROCESS is `self`, or `launcher`, which a user would stop.
"""

import os
import runpy
import signal
import sys
import time

from isotune.models.layouts.fitting import FittingBatches

HEARTBEATS_SECONDS = 1.3  # two of --ddp_timeout 6: the others know of the batch


def main() -> None:
    """Run the script."""
    number, process, script, *arguments = sys.argv[1:]
    stock, batches = FittingBatches.run, []

    def run(self, items, tokens, forward):
        batches.append(items)
        if os.environ.get("RANK") == "1" and len(batches) == 2:
            time.sleep(HEARTBEATS_SECONDS)
            os.kill(os.getpid() if process == "self" else os.getppid(), signal.Signals[number])
        yield from stock(self, items, tokens, forward)

    FittingBatches.run = run
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        FittingBatches.run = stock


main()
