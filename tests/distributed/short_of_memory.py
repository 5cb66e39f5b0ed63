"""Runs the shipped script on ranks of which one has little memory: a microbatch beyond a size raises there.

The arguments are those of train/sft_opt.py. `microbatch_tokens: auto` chooses CHOSEN tokens. The folder of the recipe
says what happens in its run, such as `rank1-backward-last-lora`: from the second step on, on rank 1, microbatches of
more than LIMIT tokens run out of memory in their backward, if they are the last of their step (or `earlier` ones).
`rank1-evaluation` is short of memory in evaluations. Another name leaves the run alone.
"""

import os
import runpy
import sys
from pathlib import Path
from typing import Any

import torch

from isotune.preflight import startup_check
from isotune.training import from_recipe
from isotune.training.update import OptimizerUpdate

CHOSEN, LIMIT = 512, 300


class LittleMemory:
    """Watches the microbatches of one rank."""

    def __init__(self, place: str, where: str) -> None:
        self.place, self.is_last, self.is_short = place, where == "last", False

    def begin(self, update: OptimizerUpdate, microbatch: dict[str, Any], last: bool) -> None:
        """A microbatch is computed next."""
        assert update.result is not None
        tokens = microbatch["inputs"]["input_ids"].shape[1]
        here = self.place != "evaluation" and last is self.is_last
        self.is_short = here and update.result.step.number > 0 and tokens > LIMIT

    def look(self, module: Any, inputs: Any, output: torch.Tensor) -> None:
        """A block within the model is computed: gradients of the later ones exist when its backward begins."""
        if self.place == "evaluation" and not module.training and output.shape[:-1].numel() > LIMIT:
            self.run_out()
        elif self.is_short and output.requires_grad:
            if self.place == "forward":
                self.run_out()
            output.register_hook(lambda gradient: self.run_out())

    def run_out(self) -> None:
        """As torch's allocator does."""
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def main() -> None:
    """Train."""
    rank, place, where, *_ = [*Path(sys.argv[-1]).parent.name.split("-"), "", "", ""]
    memory = LittleMemory(place, where) if rank == f"rank{os.environ.get('RANK', '0')}" else None
    build, stock, choose = from_recipe.build_model, OptimizerUpdate.microbatch, startup_check.choose_microbatch_tokens

    def watched(self, model, microbatch, outputs, *, last):
        if memory is not None:
            memory.begin(self, microbatch, last)
        stock(self, model, microbatch, outputs, last=last)

    def build_and_watch(*arguments, **more):
        model = build(*arguments, **more)
        if memory is not None:
            layer = next(module for name, module in model.named_modules() if name.endswith("layers.0.fc2"))
            layer.register_forward_hook(memory.look)
        return model

    startup_check.choose_microbatch_tokens = lambda *_: (CHOSEN, None)
    from_recipe.build_model, OptimizerUpdate.microbatch = build_and_watch, watched
    try:
        runpy.run_path("train/sft_opt.py", run_name="__main__")
    finally:
        from_recipe.build_model, OptimizerUpdate.microbatch = build, stock
        startup_check.choose_microbatch_tokens = choose


main()
