"""Runs train/sft_opt.py, whose rank 1 has a bug in its third update; the arguments are the script's.

In a folder `at-the-start` every rank has it in the checks before the first step.
"""

import os
import runpy
import sys
from pathlib import Path

from isotune.training.callbacks import PreTrainChecks
from isotune.training.update import OptimizerUpdate


def main() -> None:
    """Train."""
    stock = OptimizerUpdate.microbatch

    def microbatch(self, model, microbatch, outputs, *, last):
        assert self.result is not None
        if os.environ.get("RANK") == "1" and self.result.step.number == 2:
            raise KeyError("a bug of nobody's input")
        stock(self, model, microbatch, outputs, last=last)

    stock_checks = PreTrainChecks.on_train_begin

    def on_train_begin(self, *given, **more):
        raise KeyError("a bug of nobody's input")

    if Path(sys.argv[-1]).parent.name == "at-the-start":
        PreTrainChecks.on_train_begin = on_train_begin
    else:
        OptimizerUpdate.microbatch = microbatch
    try:
        runpy.run_path("train/sft_opt.py", run_name="__main__")
    finally:
        OptimizerUpdate.microbatch, PreTrainChecks.on_train_begin = stock, stock_checks


main()
