"""Measures what a real training step holds beside what is always there, in a process of its own and without a formula.

    python tests/numerics/step_memory.py RECIPE.yaml RECIPE.yaml ...

trains two optimizer updates of each recipe and prints a JSON line: by how many bytes the second rose above what was
there before it began (weights, moments, integer sums), passes, reduction, clipping and the optimizer's own step
included; and how many of them are the whole gradients that one pass hands to the next.

Every block that torch's CPU allocator hands out and takes back is an event of torch.profiler, those inside operations
too. Resident memory would be too coarse: glibc keeps freed blocks, and pages of libraries come and go in it.
"""

import gc
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from tests.building import build, build_classifier
from torch.profiler import ProfilerActivity, profile

from isotune.models.supervised_loss import forget_workspaces
from isotune.training.trainer import PlannedTraining

MEASURED_STEP = 2  # moments are there by then


def measure(values: dict[str, Any]) -> dict[str, int]:
    """Train two steps of the recipe `values`; returns the bytes of the second: `rise`, and `gradients` within it."""
    with tempfile.TemporaryDirectory() as folder:
        make = build_classifier if "num_labels" in values else build
        trainer = make(Path(folder), **{**values, "output_dir": f"{folder}/run", "eval_dataset_name": None}).trainer
        seen = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        found: dict[str, int] = {}

        def training_step(model: Any, inputs: Any, *rest: Any) -> Any:
            if inputs["step"].number + 1 == MEASURED_STEP:
                forget_workspaces()
                gc.collect()
                seen.start()
            loss = PlannedTraining.training_step(trainer, model, inputs, *rest)
            found["gradients"] = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
            return loss

        def step_is_over(*rest: Any, **more: Any) -> None:
            if trainer.state.global_step == MEASURED_STEP and "rise" not in found:  # it is called once more at the end
                seen.stop()
                found["rise"] = rise_of(seen)
            type(trainer)._maybe_log_save_evaluate(trainer, *rest, **more)

        trainer.training_step = training_step
        trainer._maybe_log_save_evaluate = step_is_over
        trainer.train()
        if trainer.plan.exact_gradients:  # each gradient is absorbed as it comes, and none is handed to the next pass
            found["gradients"] = 0
    forget_workspaces()
    return found


def rise_of(seen: profile) -> int:
    """The bytes by which a profile with `profile_memory` rose at most above what was there when it began."""
    events: list[Any] = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


if __name__ == "__main__":
    for file in sys.argv[1:]:
        print(json.dumps(measure(yaml.safe_load(Path(file).read_text()))), flush=True)
