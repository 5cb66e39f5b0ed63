"""Runs the shipped script several times in the processes of one launch, because a start costs more than a small run.

    accelerate launch --config_file ... tests/distributed/one_after_the_other.py SCRIPT COUNTED RUN.yaml RUN.yaml ...

In the training step COUNTED (from 1; 0 for none) the collectives of this rank are counted, by the names that the
backend gives them, and appended to `collectives-RANK.jsonl` beside the run.
"""

import collections
import json
import os
import runpy
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState


def count_collectives(step: int) -> None:
    """Profile one training step of every run that follows."""
    from isotune.training.trainer import PlanTrainer

    stock = PlanTrainer.training_step

    def counted(self, model, inputs, *rest, **more):
        if inputs["step"] + 1 != step:
            return stock(self, model, inputs, *rest, **more)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            loss = stock(self, model, inputs, *rest, **more)
        names = [e.name.removeprefix("gloo:") for e in profile.events() if e.name.startswith("gloo:")]
        record = {"passes": len(inputs["passes"]), **collections.Counter(names)}
        folder = Path(self.args.output_dir).parent
        with (folder / f"collectives-{self.process.rank}.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        return loss

    PlanTrainer.training_step = counted


def main() -> None:
    """Every run in its turn; the first that fails ends them all."""
    script, step, *recipes = sys.argv[1:]
    if int(step):
        count_collectives(int(step))
    for recipe in recipes:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        sys.argv = [script, "--config", recipe]
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            if end.code:
                print(f"{recipe} ended with {end.code} on rank {os.environ.get('RANK')}", file=sys.stderr)
                raise


main()
