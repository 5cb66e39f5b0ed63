"""Runs train/sft_opt.py, whose rank 1 has a bug in its third update; the arguments are the script's."""

import os
import runpy

from isotune.training.update import OptimizerUpdate


def main() -> None:
    """Train."""
    stock = OptimizerUpdate.microbatch

    def microbatch(self, model, microbatch, outputs, *, last):
        assert self.result is not None
        if os.environ.get("RANK") == "1" and self.result.step.number == 2:
            raise KeyError("a bug of nobody's input")
        stock(self, model, microbatch, outputs, last=last)

    OptimizerUpdate.microbatch = microbatch
    try:
        runpy.run_path("train/sft_opt.py", run_name="__main__")
    finally:
        OptimizerUpdate.microbatch = stock


main()
