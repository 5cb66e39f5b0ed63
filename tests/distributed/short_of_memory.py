"""Runs the shipped script on ranks of which one has little memory: its microbatches beyond a size raise.

The arguments are those of train/sft_opt.py. `microbatch_tokens: auto` chooses CHOSEN tokens. On the rank SHORT_RANK a
microbatch of more than SHORT_TOKENS tokens runs out of memory, in its forward or its backward (SHORT_IN), if it is the
last of its step or an earlier one (SHORT_LAST: 1 or 0), in the steps from SHORT_STEP (from 1) on.
"""

import os
import runpy

import torch

from isotune.preflight import startup_check
from isotune.training import from_recipe
from isotune.training.update import OptimizerUpdate

CHOSEN = 2048


def out_of_memory() -> None:
    """What torch's allocator raises."""
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def main() -> None:
    """Train."""
    step, limit = int(os.environ["SHORT_STEP"]), int(os.environ["SHORT_TOKENS"])
    build_model, stock = from_recipe.build_model, OptimizerUpdate.microbatch
    short = False

    def microbatch(self, model, of, outputs, *, last):
        nonlocal short
        here = os.environ.get("RANK", "0") == os.environ["SHORT_RANK"] and self.result.step.number + 1 >= step
        here = here and last is bool(int(os.environ["SHORT_LAST"]))
        short = here and of["inputs"]["input_ids"].shape[1] > limit
        stock(self, model, of, outputs, last=last)

    def forward(module, inputs, output: torch.Tensor) -> None:
        if short and output.requires_grad:
            if os.environ["SHORT_IN"] == "forward":
                out_of_memory()
            output.register_hook(lambda gradient: out_of_memory())

    def build_and_watch(*args, **more):
        model = build_model(*args, **more)
        # half of the blocks have their gradients when this one's backward begins
        model.get_submodule("model.decoder.layers.0.fc2").register_forward_hook(forward)
        return model

    startup_check.choose_microbatch_tokens = lambda *_: (CHOSEN, None)
    from_recipe.build_model = build_and_watch
    OptimizerUpdate.microbatch = microbatch
    runpy.run_path("train/sft_opt.py", run_name="__main__")


main()
