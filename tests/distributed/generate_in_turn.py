"""Runs eval/generate.py several times in the processes of one launch, because a start costs more than a small run.

    accelerate launch --config_file ... tests/distributed/generate_in_turn.py ARGUMENTS.json

The file holds a list of command lines. Each rank appends to PASSES-RANK.jsonl beside it how many forward passes it made
and how much of the model it held, for each of them.
"""

import json
import os
import runpy
import sys
from pathlib import Path

from accelerate.state import PartialState

import isotune.evaluation.models as generation

SCRIPT = Path(__file__).resolve().parents[2] / "eval" / "generate.py"


def count_passes(counts: list[int]) -> None:
    """Count the forward passes of every model that is loaded from now on, and what this rank holds of it."""
    for name in ("generation_model_of_run", "generation_model_named"):
        setattr(generation, name, counted(getattr(generation, name), counts))


def counted(load, counts):
    def loaded(*given, **more):
        speaker = load(*given, **more)
        parameters = list(speaker.model.parameters())
        held = sum(p.ds_tensor.numel() if hasattr(p, "ds_tensor") else p.numel() for p in parameters)
        whole = sum(p.ds_numel if hasattr(p, "ds_numel") else p.numel() for p in parameters)
        counts[:] = [0, held, whole]
        speaker.model.register_forward_pre_hook(lambda *_: counts.__setitem__(0, counts[0] + 1))
        return speaker

    return loaded


def main() -> None:
    """Every command line in its turn; the first that fails ends them all."""
    file = Path(sys.argv[1])
    environment = dict(os.environ)
    counts: list[int] = [0, 0, 0]
    count_passes(counts)
    for arguments in json.loads(file.read_text()):
        os.environ.update(environment)  # start_ranks hides the engine from accelerate
        sys.argv = [str(SCRIPT), *arguments]
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise
        with (file.parent / f"passes-{PartialState().process_index}.jsonl").open("a") as passes:
            passes.write(json.dumps(dict(zip(("passes", "held", "whole"), counts, strict=True))) + "\n")


main()
