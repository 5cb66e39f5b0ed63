"""Runs the shipped script several times in the processes of one launch, because a start costs more than a small run.

    accelerate launch --config_file ... tests/distributed/one_after_the_other.py SCRIPT COUNTED RUN.yaml RUN.yaml ...

In the training step COUNTED (from 1; 0 for none) the collectives of this rank are counted, by the names that the
backend gives them, and appended to `collectives-RANK.jsonl` beside the run, with the bytes of the tensors (what is
summed, what is scattered, what is gathered, each whole) and with what the rank holds: whole gradients, the engine's own
copies of them, the optimizer's state, and its copies of weights.
"""

import collections
import json
import math
import os
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState

SIZES = {"float": 4, "double": 8, "long int": 8, "int": 4, "c10::BFloat16": 2, "c10::Half": 2}
# where DeepSpeed's optimizers keep gradients and the weights that they update
ENGINE_GRADIENTS = ("averaged_gradients", "grad_partitions_flat_buffer", "fp32_groups_gradients_flat")
ENGINE_COPIES = ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups_flat_partition")
ENGINE_COPIES += ("fp32_groups_flat", "fp32_groups")


def count_collectives(step: int) -> None:
    """Profile one training step of every run that follows."""
    from isotune.training.trainer import PlannedTraining
    from isotune.training.update import OptimizerUpdate

    stock, stock_microbatch = PlannedTraining.training_step, OptimizerUpdate.microbatch
    held: Held | None = None

    def counted(self, model, inputs, *rest, **more):
        nonlocal held
        if inputs["step"].number + 1 != step:
            return stock(self, model, inputs, *rest, **more)
        sync = self.update.sync
        held, finish = (now := Held()), sync.finish
        sync.finish = lambda engine, **more: (now.look(self.update, model), finish(engine, **more))[1]
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
            loss = stock(self, model, inputs, *rest, **more)
        sync.finish = finish
        held.look(self.update, model)
        events = profile.profiler.kineto_results.events()
        names = [e.name().removeprefix("gloo:") for e in events if e.name().startswith("gloo:")]
        record = {"passes": len(inputs["microbatches"]), "bytes": bytes_of(events), **collections.Counter(names)}
        record["held"] = held.bytes | optimizer_bytes(self, model)
        folder = Path(self.args.output_dir).parent
        with (folder / f"collectives-{self.accelerator.process_index}.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        return loss

    def microbatch(self, model, *rest, **more):
        stock_microbatch(self, model, *rest, **more)
        if held is not None:
            held.look(self, model)

    PlannedTraining.training_step = counted
    OptimizerUpdate.microbatch = microbatch


class Held:
    """The most bytes that were seen of whole gradients, of the engine's own, and of both at one moment."""

    def __init__(self) -> None:
        self.bytes = {"gradients": 0, "engine": 0, "together": 0}

    def look(self, update, model) -> None:
        whole = storages(p.grad for p in model.parameters())
        sums = update.sync.exact.sums if update.sync.exact is not None else {}
        engine = getattr(model, "optimizer", None)
        own = storages(tensors([sums, *(getattr(engine, name, None) for name in ENGINE_GRADIENTS)]))
        for name, found in (("gradients", whole), ("engine", own), ("together", whole | own)):
            self.bytes[name] = max(self.bytes[name], sum(found.values()))


def optimizer_bytes(trainer, model) -> dict[str, int]:
    """What this rank's optimizer keeps, but for its counts of steps, and the copies of weights that it updates."""
    engine = getattr(model, "optimizer", None)
    bare = trainer.optimizer
    while hasattr(bare, "optimizer"):
        bare = bare.optimizer
    state = [tensor for tensor in tensors(list(bare.state.values())) if tensor.dim()]
    copies = tensors([getattr(engine, name, None) for name in ENGINE_COPIES])
    return {"optimizer": sum(storages(state).values()), "master_copies": sum(storages(copies).values())}


def tensors(found) -> Iterator[torch.Tensor]:
    """Every tensor in nested lists and dictionaries."""
    if isinstance(found, torch.Tensor):
        yield found
    elif isinstance(found, dict | list | tuple):
        for one in found.values() if isinstance(found, dict) else found:
            yield from tensors(one)


def storages(found) -> dict[int, int]:
    """Bytes of each distinct storage of tensors."""
    kept = {}
    for tensor in found:
        if tensor is not None:
            storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()  # FSDP2's are this rank's shares
            kept[storage.data_ptr()] = storage.nbytes()
    return kept


def bytes_of(events: list) -> dict[str, int]:
    """Bytes by collective, of one rank's profile.

    gloo scatters by an all-reduce of the whole, and tells the size of lists of tensors, which torch.distributed's own
    events do not; these tell the two apart.
    """
    counted: collections.Counter[str] = collections.Counter()
    for event in events:
        kind, name = event.name().partition(":")[::2]
        sizes = [
            math.prod(shape) * SIZES.get(dtype, 0) for shape, dtype in zip(event.shapes(), event.dtypes(), strict=False)
        ]
        if kind == "gloo":
            counted[name] += sum(sizes) * (dist.get_world_size() if name == "all_gather" else 1)
        elif name.startswith(":_reduce_scatter"):
            whole = max(sizes)
            counted["reduce_scatter"] += whole
            counted["all_reduce"] -= whole
    return dict(counted)


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
