"""Runs the shipped script with gradients that are counted: their sum is known, and 16 bits cannot hold it.

The arguments are those of train/sft_opt.py. In each step the first microbatch of rank 0 has the first whole number
after which the precision leaves one out (bf16: 256, fp16: 2,048) as the gradient of one element of the head's weight,
and every other microbatch 1, both divided by fp16's loss scale; all other elements have 0. The loss stays what it is,
and is not divided by tokens. With STOCK_POLICY in the environment FSDP2 gets accelerate's own precision.
"""

import os
import runpy

import torch

from isotune.training import from_recipe, trainer
from isotune.training.tasks import SftTask
from isotune.training.update import OptimizerUpdate

LOSS_SCALE = 2.0**16  # at which a run in fp16 begins


def main() -> None:
    """Train."""
    build_model, run = from_recipe.build_model, OptimizerUpdate.run
    passes = 0

    def run_counted(self, *args):
        nonlocal passes
        passes = 0
        return run(self, *args)

    def count(module, inputs, output: torch.Tensor) -> torch.Tensor:
        nonlocal passes
        if not (module.training and output.requires_grad and output.ndim == 0):
            return output
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else module.weight.dtype
        value = 2 / torch.finfo(dtype).eps if passes == 0 and os.environ.get("RANK", "0") == "0" else 1.0
        value /= LOSS_SCALE if dtype == torch.float16 else 1.0
        passes += 1
        counted = module.weight.flatten()[0].float() * value
        return output.detach() + 0 * output + counted - counted.detach()

    def build_and_count(*args, **more):
        model = build_model(*args, **more)
        model.get_output_embeddings().register_forward_hook(count)
        return model

    from_recipe.build_model = build_and_count
    OptimizerUpdate.run = run_counted
    SftTask.denominator = lambda self, step: 1.0
    if os.environ.get("STOCK_POLICY"):
        trainer.reduce_fsdp_in_fp32 = lambda accelerator: None
    runpy.run_path("train/sft_opt.py", run_name="__main__")


main()
