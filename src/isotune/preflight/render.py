"""A plan as people read it on a terminal, and as machines read it in JSON."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from isotune.preflight.resources.communication import bytes_sent, collectives
from isotune.preflight.resources.compute import flops_per_step
from isotune.preflight.run_plan import RunPlan

_PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "master_copies": "fp32 copies of the shares",
    "communication": "communication buffers",
    "activations": "activations and loss",
    "margin": "fragmentation margin",
}


def short_lines(plan: RunPlan) -> list[str]:
    """The plan in the few lines that a training script prints before it begins."""
    lines = list(_work_lines(plan))[:1]
    parts = ", ".join(f"{_PARTS[name]} {size(value)}" for name, value in plan.memory.parts.items() if value)
    return [*lines, f"memory      {size(plan.memory.total)} a process: {parts}"]


def page(plan: RunPlan, price_per_hour: float | None) -> str:
    """The whole plan; problems stand first."""
    return "\n".join(
        [
            *_problems(plan),
            *_recipe_lines(plan),
            "",
            *_work_lines(plan),
            "",
            *_memory_lines(plan),
            "",
            *_time_lines(plan, price_per_hour),
            *_rows(plan),
        ]
    )


def as_json(plan: RunPlan, price_per_hour: float | None) -> dict[str, Any]:
    """Every figure of the plan: bytes, seconds, FLOPs."""
    recipe, launch = plan.asked.recipe, plan.asked.launch
    found: dict[str, Any] = {
        "problems": list(plan.asked.problems),
        "recipe": recipe.resolved(),
        "launch": {"engine": launch.engine, "zero_stage": launch.zero_stage, "world_size": launch.world_size,
                   "offload": list(launch.offload), "file": launch.name},
        "parameters": {"all": plan.model.numbers, "trained": plan.model.trained},
        "memory_bytes": {**plan.memory.parts, "total": plan.memory.total,
                         "in_host_memory": plan.memory.in_host_memory},
        "optimized_numbers_per_rank": plan.memory.optimized_numbers,
        "limit_bytes": plan.limit,
        "fits": plan.fits,
        "remedies": [asdict(remedy) for remedy in plan.remedies],
        "checkpoint_bytes": plan.checkpoint_bytes,
        "disk_bytes": plan.disk_bytes,
        "work": None if plan.work is None else asdict(plan.work),
        "why_no_work": plan.why_no_work,
        "comparison": [
            {"engine": row.launch.in_words, "world_size": row.launch.world_size, "memory_bytes": row.memory.total,
             "step_seconds": row.time and row.time.expected,
             "communication_seconds": row.time and row.time.communication}
            for row in plan.rows
        ],
    }  # fmt: skip
    if plan.work is not None:
        found["flops_per_step"] = flops_per_step(recipe, plan.model, plan.work)
        found["bytes_sent_per_step"] = bytes_sent(recipe, plan.model, launch, plan.work.passes_per_rank)
        found["collectives_per_step"] = collectives(recipe, plan.model, launch, plan.work.passes_per_rank)
    if plan.time is not None and plan.device is not None:
        found["device"] = plan.device.name
        found["step_seconds"] = {"floor": plan.time.floor, "compute": plan.time.compute,
                                 "communication": plan.time.communication, "expected": plan.time.expected}  # fmt: skip
        found["hours"] = plan.hours
        found["share_of_peak"] = plan.share
        if price_per_hour is not None and plan.hours is not None:
            found["price"] = plan.hours * launch.world_size * price_per_hour
    return found


def size(count: float) -> str:
    """Bytes in the unit that people say them in."""
    for unit, bytes_ in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= bytes_:
            return f"{count / bytes_:.2f} {unit}"
    return f"{count:.0f} B"


def _problems(plan: RunPlan) -> Iterator[str]:
    if plan.asked.problems:
        yield f"problems    {len(plan.asked.problems)}, and the plan is of what is left without them"
        yield from (f"  {number}. {sentence}" for number, sentence in enumerate(plan.asked.problems, start=1))
        yield ""


def _recipe_lines(plan: RunPlan) -> Iterator[str]:
    recipe, launch, model = plan.asked.recipe, plan.asked.launch, plan.model
    precision = "bf16" if recipe.bf16 else "fp16" if recipe.fp16 else "fp32"
    yield f"recipe      {recipe.model_name_or_path}, {recipe.tune}, {precision}, on {recipe.dataset_name}"
    yield f"launch      {launch.in_words} ({launch.name})"
    yield f"trained     {model.trained:,} of {model.numbers:,} parameters ({model.trained / model.numbers:.2%})"


def _work_lines(plan: RunPlan) -> Iterator[str]:
    work = plan.work
    if work is None:
        yield f"work        not counted: {plan.why_no_work}"
        return
    filled = (
        "" if work.packing_efficiency is None else f" in {work.rows:,} rows filled to {work.packing_efficiency:.2%}"
    )
    yield (
        f"work        {work.steps:,} steps, {work.epochs:.2f} epochs of {work.documents:,} documents, "
        f"{work.tokens:,} tokens{filled}"
    )
    yield (
        f"a step      {work.tokens_per_step:,.0f} tokens, {work.targets_per_step:,.0f} targets, "
        f"{work.passes_per_step} passes, {work.passes_per_rank} on a process; imbalance {work.imbalance:.1%}"
    )
    yield (
        f"on disk     {work.evaluations} evaluations; {work.checkpoints} checkpoints of {size(plan.checkpoint_bytes)}, "
        f"{size(plan.disk_bytes)} at most at once"
    )


def _memory_lines(plan: RunPlan) -> Iterator[str]:
    memory = plan.memory
    yield "memory      on the fullest process"
    for name, value in memory.parts.items():
        if value:
            yield f"  {_PARTS[name]:<28}{size(value):>12}"
    yield f"  {'together':<28}{size(memory.total):>12}"
    if memory.in_host_memory:
        yield f"  {'in host memory':<28}{size(memory.in_host_memory):>12}"
    yield from (f"  {note}" for note in memory.notes)
    if plan.limit is None:
        return
    if plan.fits:
        yield f"fits        {size(memory.total)} of {size(plan.limit)}"
        return
    yield f"fits not    {size(memory.total)} of {size(plan.limit)}; what would fit, the same result first:"
    widest = max((len(remedy.change) for remedy in plan.remedies), default=0)
    for remedy in plan.remedies:
        other = "" if remedy.same_result else "   another experiment"
        yield f"  {remedy.change:<{widest}}{size(remedy.total):>12}{other}"
    if not plan.remedies:
        yield "  none of the changes that a plan tries: a smaller model, or more processes that shard"


def _time_lines(plan: RunPlan, price_per_hour: float | None) -> Iterator[str]:
    if plan.work is None:
        return
    recipe, launch = plan.asked.recipe, plan.asked.launch
    yield (
        f"compute     {flops_per_step(recipe, plan.model, plan.work):.4g} FLOPs a step, "
        f"{size(bytes_sent(recipe, plan.model, launch, plan.work.passes_per_rank))} sent by a process"
    )
    if plan.time is None or plan.device is None:
        yield "time        say --device NAME for seconds and hours"
        return
    how = "as measured" if plan.share_is_measured else "assumed: --measured RUN takes it from a finished run"
    yield (
        f"time        {plan.time.floor:.4g} s a step at {plan.device.name}'s peak; {plan.time.expected:.4g} s expected "
        f"at {plan.share:.0%} of it ({how}), {plan.time.communication:.2g} s of them for communication"
    )
    assert plan.hours is not None
    cost = ""
    if price_per_hour is not None:
        cost = f", {plan.hours * launch.world_size * price_per_hour:,.2f} at {price_per_hour:g} a process and hour"
    yield f"together    {plan.hours:,.2f} hours, {plan.hours * launch.world_size:,.2f} device hours{cost}"


def _rows(plan: RunPlan) -> Iterator[str]:
    if not plan.rows:
        return
    yield ""
    yield f"  {'engine':<52}{'memory':>12}{'s a step':>12}{'communication':>15}"
    for row in plan.rows:
        seconds = f"{row.time.expected:>12.4g}{row.time.communication:>15.3g}" if row.time else ""
        yield f"  {row.launch.in_words:<52}{size(row.memory.total):>12}{seconds}"
