"""Runs the shipped script on a model whose loss is finite and whose gradient is not, where one token passes.

The arguments are those of train/sft_opt.py.
"""

import math
import runpy

import torch
from tests.e2e.test_nonfinite import rare_token

from isotune.training import from_recipe


def main() -> None:
    """Train; the gradient of the rare token's embedding is multiplied beyond every number."""
    token = rare_token()
    build_model = from_recipe.build_model

    def watch(module, inputs, output: torch.Tensor) -> None:
        if output.requires_grad and bool((inputs[0] == token).any()):
            output.register_hook(lambda gradient: gradient * math.inf)

    def build_and_watch(*args, **more):
        model = build_model(*args, **more)
        model.get_input_embeddings().register_forward_hook(watch)
        return model

    from_recipe.build_model = build_and_watch
    runpy.run_path("train/sft_opt.py", run_name="__main__")


main()
