"""The preflight report as text for the terminal, as JSON, and its comparison of launches as a plot."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from isotune.io.errors import UserError
from isotune.io.files import replacing
from isotune.preflight.preflight_report import ComparedLaunch, PreflightReport
from isotune.preflight.resources.compute import flops_per_step
from isotune.preflight.resources.memory import PARTS, format_bytes
from isotune.preflight.resources.sharding import Sharding

# keys of the JSON output that differ from the fields of Work; scripts read them
_WORK_KEYS = {
    "microbatches_per_step": "passes_per_step",
    "microbatches_per_rank": "passes_per_rank",
    "costliest_microbatch": "longest_pass",
}


def render_report(report: PreflightReport, price_per_hour: float | None) -> str:
    """The whole report; problems come first."""
    lines = [*_recipe_lines(report), "", *_work_lines(report), "", *_memory_lines(report), ""]
    return "\n".join([*lines, *_time_lines(report, price_per_hour), *_comparison_lines(report)])


def as_json(report: PreflightReport, price_per_hour: float | None) -> dict[str, Any]:
    """Every number of the report: bytes, seconds, FLOPs."""
    recipe, launch, work = report.request.recipe, report.request.launch, report.work
    values: dict[str, Any] = {
        "problems": list(report.request.problems),
        "recipe": recipe.resolved(),
        "launch": {"engine": launch.engine, "zero_stage": launch.zero_stage, "world_size": launch.world_size,
                   "offload": list(launch.offload), "file": launch.name},
        "parameters": {"all": report.model.numel, "trained": report.model.trained_numel},
        "memory_bytes": {**report.memory.parts, "total": report.memory.total,
                         "in_host_memory": report.memory.in_host_memory},
        "optimized_numbers_per_rank": report.memory.optimized_numel,
        "limit_bytes": report.limit,
        "fits": report.fits,
        "chosen_microbatch_tokens": report.chosen_tokens,
        "less_waiting": report.less_waiting and asdict(report.less_waiting),
        "remedies": [asdict(suggestion) for suggestion in report.suggestions],
        "checkpoint_bytes": report.checkpoint_bytes,
        "disk_bytes": report.disk_bytes,
        "work": work and {_WORK_KEYS.get(name, name): value for name, value in asdict(work).items()},
        "why_no_work": report.no_work_reason,
        "without_effect": list(report.without_effect),
        "comparison": [
            {"engine": row.launch.in_words, "world_size": row.launch.world_size, "memory_bytes": row.memory.total,
             "step_seconds": row.time and row.time.expected,
             "communication_seconds": row.time and row.time.communication}
            for row in report.rows
        ],
    }  # fmt: skip
    if work is not None:
        sharding = Sharding(recipe, report.model, launch)
        values["flops_per_step"] = flops_per_step(recipe, report.model, work)
        values["bytes_sent_per_step"] = sharding.bytes_sent(work.microbatches_per_rank)
        values["collectives_per_step"] = sharding.collectives(work.microbatches_per_rank)
    if report.time is not None and report.device is not None:
        values["device"] = report.device.name
        time = report.time
        values["step_seconds"] = {**asdict(time), "compute": time.compute, "expected": time.expected}
        values["hours"] = report.hours
        values["share_of_peak"] = time.mfu
        assert work is not None, "a time is that of counted work"
        values["tokens_per_second"] = work.tokens_per_step / time.expected
        if price_per_hour is not None and report.hours is not None:
            values["price"] = report.hours * launch.world_size * price_per_hour
    return values


def draw_scaling(report: PreflightReport, file: Path) -> Path:
    """Draw the comparison of a report as a PNG, atomically; without a device there is no panel of times."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines: dict[str, list[ComparedLaunch]] = defaultdict(list)
    for row in report.rows:
        lines[row.launch.in_words.split(" on ")[0]].append(row)
    timed = all(row.time for row in report.rows)
    figure, (panels,) = pyplot.subplots(1, 2 if timed else 1, figsize=(10 if timed else 5.5, 4), squeeze=False)
    for name, rows in lines.items():
        sizes = [row.launch.world_size for row in rows]
        panels[0].plot(sizes, [row.memory.total / 2**30 for row in rows], marker="o", label=name)
        if timed:
            panels[1].plot(sizes, [row.time.expected for row in rows if row.time], marker="o", label=name)
            panels[1].set(ylabel="expected seconds a step", yscale="log")
    panels[0].set_ylabel("GiB on a process")
    if report.limit is not None:
        panels[0].axhline(report.limit / 2**30, linestyle="--", color="black", label="memory of a process")
    counts = sorted({row.launch.world_size for row in report.rows})
    for panel in panels:
        panel.set_xscale("log", base=2)
        panel.set_xticks(counts, [str(count) for count in counts])
        panel.set_xlabel("processes")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    figure.tight_layout()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as staging:
            figure.savefig(staging, format="png", dpi=120)
    except OSError as error:
        raise UserError(f"--picture {file} cannot be written: {error.strerror}") from error
    finally:
        pyplot.close(figure)
    return file


def _recipe_lines(report: PreflightReport) -> Iterator[str]:
    request, model = report.request, report.model
    recipe, launch, problems = request.recipe, request.launch, request.problems
    if problems:
        yield f"problems    {len(problems)}; the report below ignores the wrong values"
        yield from (f"  {number}. {sentence}" for number, sentence in enumerate(problems, start=1))
        yield ""
    precision = recipe.mixed_precision if recipe.mixed_precision != "no" else "fp32"
    trained = model.trained_numel
    yield f"recipe      {recipe.model_name_or_path}, {recipe.tune}, {precision}, on {recipe.dataset_name}"
    yield f"launch      {launch.in_words} ({launch.name})"
    if report.chosen_tokens is not None:
        yield f"microbatch  {report.chosen_tokens:,} tokens, chosen by microbatch_tokens: auto"
    yield f"trained     {trained:,} of {model.numel:,} parameters ({trained / model.numel:.2%})"


def _work_lines(report: PreflightReport) -> Iterator[str]:
    work = report.work
    if work is None:
        yield f"work        not counted: {report.no_work_reason}"
        return
    filled = work.packing_efficiency
    packing = "" if filled is None else f" in {work.rows:,} rows filled to {filled:.2%}"
    yield (
        f"work        {work.steps:,} steps, {work.epochs:.2f} epochs of {work.documents:,} documents, "
        f"{work.tokens:,} tokens{packing}"
    )
    yield (
        f"a step      {work.tokens_per_step:,.0f} tokens, {work.targets_per_step:,.0f} targets, "
        f"{work.microbatches_per_step} microbatches, {work.microbatches_per_rank} on a process; "
        f"imbalance {work.imbalance:.1%}"
    )
    yield from (f"no effect   {sentence}" for sentence in report.without_effect)
    if report.less_waiting is not None:
        yield (
            "waiting     microbatches of exact_gradients do not depend on the processes, which therefore wait for each "
            f"other; --microbatch_tokens {report.less_waiting.microbatch_tokens} makes the imbalance "
            f"{report.less_waiting.imbalance:.1%}"
        )
    yield (
        f"on disk     {work.evaluations} evaluations; {work.checkpoints} checkpoints of "
        f"{format_bytes(report.checkpoint_bytes)}, {format_bytes(report.disk_bytes)} at most at once"
    )


def _memory_lines(report: PreflightReport) -> Iterator[str]:
    memory = report.memory
    yield "memory      on the process that needs most"
    for name, value in memory.parts.items():
        if value:
            yield f"  {PARTS[name]:<28}{format_bytes(value):>12}"
    yield f"  {'total':<28}{format_bytes(memory.total):>12}"
    if memory.in_host_memory:
        yield f"  {'in host memory':<28}{format_bytes(memory.in_host_memory):>12}"
    yield from (f"  {note}" for note in memory.notes)
    if report.limit is None:
        return
    total_of_limit = f"{format_bytes(memory.total)} of {format_bytes(report.limit)}"
    if report.fits:
        yield f"fits        {total_of_limit}"
        return
    yield f"too large   {total_of_limit}; what would fit, changes with the same result first:"
    width = max((len(suggestion.change) for suggestion in report.suggestions), default=0)
    for suggestion in report.suggestions:
        effect = "" if suggestion.same_result else "   changes the result"
        yield f"  {suggestion.change:<{width}}{format_bytes(suggestion.total):>12}{effect}"
    if not report.suggestions:
        yield "  none of the changes that were tried: take a smaller model, or more processes with sharding"


def _time_lines(report: PreflightReport, price_per_hour: float | None) -> Iterator[str]:
    work = report.work
    if work is None:
        return
    recipe, launch = report.request.recipe, report.request.launch
    sent = Sharding(recipe, report.model, launch).bytes_sent(work.microbatches_per_rank)
    yield (
        f"compute     {flops_per_step(recipe, report.model, work):.4g} FLOPs a step, "
        f"{format_bytes(sent)} sent by a process"
    )
    if report.time is None or report.device is None or report.hours is None:
        yield "time        say --device NAME for seconds and hours"
        return
    time, rate = report.time, work.tokens_per_step / report.time.expected
    yield (
        f"time        {time.expected:.4g} s a step, {rate:,.0f} tokens/s, {time.mfu:.0%} of "
        f"{report.device.name}'s peak, at which it would take {time.floor:.4g} s"
    )
    if time.measured is not None:
        parts = {"computation as measured": time.measured}
    else:
        parts = {"products": time.products, "attention": time.attention, "element-wise": time.elementwise}
        parts |= {"waiting for launches": time.launches, "optimizer": time.optimizer}
    parts["communication not hidden"] = time.communication
    yield "  of them   " + ", ".join(f"{name} {seconds:.2g} s" for name, seconds in parts.items() if seconds)
    device_hours = report.hours * launch.world_size
    price = ""
    if price_per_hour is not None:
        price = f", {device_hours * price_per_hour:,.2f} at {price_per_hour:g} a process and hour"
    yield f"total       {report.hours:,.2f} hours, {device_hours:,.2f} device hours{price}"


def _comparison_lines(report: PreflightReport) -> Iterator[str]:
    if report.rows:
        yield f"\n  {'engine':<52}{'memory':>12}{'s a step':>12}{'communication':>15}"
    for row in report.rows:
        seconds = f"{row.time.expected:>12.4g}{row.time.communication:>15.3g}" if row.time else ""
        yield f"  {row.launch.in_words:<52}{format_bytes(row.memory.total):>12}{seconds}"
