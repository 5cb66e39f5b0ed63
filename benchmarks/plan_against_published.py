"""How close are the times and the memory of `isotune plan` to published figures?

    python benchmarks/plan_against_published.py                        # the comparison
    python benchmarks/plan_against_published.py --write docs/plan.md   # and its tables in the page
    python benchmarks/plan_against_published.py --fit                  # fit the parameters of the time model anew

Reads ../shared/data/published_throughput.csv (or published_throughput.csv in $ISOTUNE_TEST_DATA). The sources, in
alphabetical order, are fitted on and judged by turns: the time model's parameters come from the first, third, fifth,
and its errors from the second, fourth, sixth. Nothing of the memory is fitted, so every row counts there. Each row is
planned as isotune would run it: the same geometry, tokens, engine and device, with the traced training code of isotune.
"""

import argparse
import collections
import csv
import json
import math
import os
import statistics
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from published.geometry import config_of
from published.sources import Row, Settings, Unexplained, settings_of

from isotune.config import Recipe
from isotune.preflight.request import DDP, FSDP, PLAIN, Launch
from isotune.preflight.resources.activation_memory import MicrobatchMemory, trace_microbatch
from isotune.preflight.resources.compute import count_flops
from isotune.preflight.resources.devices import Device, find_device
from isotune.preflight.resources.sharding import ModelStats, Sharding, model_builder, model_stats
from isotune.preflight.resources.step_time import (
    PARAMETERS,
    Elsewhere,
    StepLoad,
    load_of,
    load_parameters,
    predict_step,
)
from isotune.preflight.resources.traffic import Traffic

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("ISOTUNE_TEST_DATA", ROOT.parent / "shared/data")) / "published_throughput.csv"
BEGIN, END = "<!-- plan_against_published: begin -->\n", "<!-- plan_against_published: end -->\n"
GIB = 2**30
# by words in the table's name of a device
_DEVICES = {"h200": "H200", "h100": "H100", "a100 40": "A100-40", "a100_40": "A100-40", "a100": "A100-80",
            "4090": "RTX4090", "a6000": "A6000"}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A row that can be planned."""

    row: Row
    settings: Settings
    device: Device
    sharding: Sharding
    load: StepLoad
    memory_bytes: float | None
    printed: float | None  # tokens a second of a device

    @property
    def name(self) -> str:
        """Model, tuning, tokens a row, device and number."""
        launch = self.sharding.launch
        return (f"{self.row['model']}, {self.row['tune']}, {self.settings.seq_len:,} tokens, "
                f"{launch.world_size} x {self.device.name}")  # fmt: skip

    def predict(self, parameters: Mapping[str, float]) -> float:
        """Tokens a second of a device."""
        s = self.settings
        time = predict_step(self.sharding, s.accumulation, self.load, self.device, s.per_node,
                            parameters=parameters, as_elsewhere=Elsewhere(s.fused, overlaps=True))  # fmt: skip
        return s.rows * s.seq_len * s.accumulation / time.expected

    def share_of_peak(self) -> float:
        """Of the device, which the printed tokens/s need at least."""
        tokens = self.settings.rows * self.settings.seq_len * self.settings.accumulation
        flops = self.load.product_flops + self.load.attention_flops
        return (self.printed or 0) * flops / tokens / self.device.flops_16_bit


def repository(row: Row) -> str:
    """The source without its commit and date."""
    return " ".join(row["source"].split()[: 2 if row["source"].startswith("NVIDIA NeMo") else 1])


def split(rows: Sequence[Row]) -> tuple[list[str], list[str]]:
    """Sources to fit on and to judge by, by turns in alphabetical order."""
    names = sorted({repository(row) for row in rows}, key=str.lower)
    return names[::2], names[1::2]


def read_cases(rows: Sequence[Row]) -> tuple[list[Case], list[tuple[Row, str]]]:
    """The rows that can be planned, and the others with the reason."""
    cases, others = [], []
    for number, row in enumerate(rows, start=1):
        print(f"\r{number}/{len(rows)}", end="", file=sys.stderr, flush=True)
        try:
            case = _case(row)
            if case.share_of_peak() > 0.95:
                share = f"{case.share_of_peak():.0%} of the {case.device.name}'s peak"
                others.append((row, f"the printed tokens/s need {share}: it must be another card"))
                case = replace(case, printed=None)
        except Unexplained as reason:
            others.append((row, str(reason)))
        else:
            cases.append(case)
    print(file=sys.stderr)
    return cases, others


def _case(row: Row) -> Case:
    settings = settings_of(row)
    config = config_of(row["model"])
    if config is None:
        raise Unexplained("isotune's plan has no such model")
    named = row["device"].lower()
    device = find_device(next(name for words, name in _DEVICES.items() if words in named))
    if settings.network_bytes_per_second:
        device = replace(device, network_bytes_per_second=settings.network_bytes_per_second)
    count = int(row["num_devices"])
    engine = PLAIN if count == 1 else DDP if "flash-attention" in row["source"] else FSDP
    recipe, stats = _model(row["model"], row["tune"], settings.recompute >= 0.5)
    sharding = Sharding(recipe, stats, Launch(engine, count))
    tokens = float(settings.rows * settings.seq_len)
    flops, traced = [0.0, 0.0], []
    for repeated, weight in ((False, 1 - settings.recompute), (True, settings.recompute)):
        if not weight:
            continue
        other, _ = _model(row["model"], row["tune"], repeated)
        counted = count_flops(other, stats, tokens, tokens, tokens * settings.seq_len)
        flops = [total + weight * n for total, n in zip(flops, counted, strict=True)]
        traced.append(_trace(row["model"], row["tune"], repeated, settings.seq_len, settings.rows))
    moved = traced[0].traffic.extrapolate(traced[-1].traffic, settings.recompute if len(traced) > 1 else 0)
    n = settings.accumulation
    moved = Traffic(n * moved.product_bytes, n * moved.elementwise_bytes, n * moved.launches)
    load = load_of(sharding, n * flops[0], n * flops[1], moved, n)
    memory = None
    if row["peak_memory_gib"] and settings.state_bytes:
        memory = _memory(sharding, settings.state_bytes, traced[-1])
    printed = float(row["tokens_per_second_per_device"] or 0) or None
    return Case(row, settings, device, sharding, load, memory, printed)


def _memory(sharding: Sharding, state: tuple[float, float, float], traced: MicrobatchMemory) -> float:
    """Bytes of a process with so many bytes of weight, gradient and optimizer for each trained parameter."""
    model, count = sharding.model, sharding.launch.world_size
    frozen = model.bytes - sum(p.bytes for p in model.parameters if p.trained)
    held = (frozen + sum(state) * model.trained_numel) / count
    return held + traced.activations + (sharding.gathered_bytes if count > 1 else 0)


@cache
def _model(model: str, tune: str, recompute: bool) -> tuple[Recipe, ModelStats]:
    """The recipe of a geometry, and its counts."""
    recipe = Recipe.from_values(
        model_name_or_path="builtin:opt-tiny", dataset_name="x", output_dir="x", tune=tune, bf16=True,
        gradient_checkpointing=recompute, exact_gradients=False, **({} if tune == "full" else {"lora_dropout": 0.0}),
    )  # fmt: skip
    return recipe, model_stats(recipe, _config(model))


def _config(model: str) -> Any:
    config = config_of(model)
    assert config is not None, "a row of another model is not planned"
    return config


def _trace(model: str, tune: str, recompute: bool, seq_len: int, rows: int) -> MicrobatchMemory:
    """The microbatch; beyond two rows what a row more has is added, which is all that another row changes."""
    if rows == 1:
        return _trace_rows(model, tune, recompute, seq_len, 1)
    one, two = (_trace_rows(model, tune, recompute, seq_len, n) for n in (1, 2))
    activations = one.activations + (rows - 1) * (two.activations - one.activations)
    return MicrobatchMemory(activations, 0, one.traffic.extrapolate(two.traffic, rows - 1))


@cache
def _trace_rows(model: str, tune: str, recompute: bool, seq_len: int, rows: int) -> MicrobatchMemory:
    config, (recipe, _) = _config(model), _model(model, tune, recompute)
    build, whole = model_builder(recipe.with_values(max_seq_length=seq_len), config), tune == "full"
    return trace_microbatch(
        (lambda layers: build(layers).to(torch.bfloat16)) if whole else build, config.num_hidden_layers,
        (seq_len,) * rows, rows * seq_len, is_classifier=False, autocast=None if whole else torch.bfloat16,
        on_cpu=False, checkpointing=recompute,
    )  # fmt: skip


# Where a fit starts, and the largest value: products cannot be faster than the fastest that anybody measured alone on
# such a card (Bekman, Machine Learning Engineering, maximum achievable matmul FLOPS).
PRIORS = {
    "products_A100": (0.75, 0.87), "products_H100": (0.5, 0.8), "products_H200": (0.72, 0.8),
    "elementwise_eager": (1.0, 3.0), "elementwise_fused": (0.5, 1.5), "slowest": (1.05, 1.3), "overlap": (0.8, 1.0),
}  # fmt: skip
ROW_ERROR, PRIOR_ERROR = 0.1, 0.25  # relative standard deviations that the fit assumes


def fit(cases: Sequence[Case]) -> dict[str, float]:
    """The fitted parameters: least squares of the logarithm of tokens/s, and of the distance from where they start."""
    from scipy.optimize import least_squares

    fixed = yaml.safe_load(PARAMETERS.read_text(encoding="utf-8"))["fixed"]
    start, most = (dict(zip(PRIORS, values, strict=True)) for values in zip(*PRIORS.values(), strict=True))
    least = {name: 1.0 if name == "slowest" else 0.05 for name in PRIORS}

    def residuals(found: Sequence[float]) -> list[float]:
        fitted = dict(zip(PRIORS, found, strict=True))
        errors = [math.log(case.predict(fixed | fitted) / (case.printed or 1)) / ROW_ERROR for case in cases]
        return errors + [(fitted[name] / start[name] - 1) / PRIOR_ERROR for name in PRIORS]

    bounds = list(least.values()), list(most.values())
    found = least_squares(residuals, list(start.values()), bounds=bounds).x
    return {name: float(f"{value:.3g}") for name, value in zip(PRIORS, found, strict=True)}


def write_parameters(fitted: Mapping[str, float]) -> None:
    """Replace the fitted values in the file, whose comments stay."""
    lines = PARAMETERS.read_text(encoding="utf-8").splitlines(keepends=True)
    for number, line in enumerate(lines):
        name = line.split(":")[0].strip()
        if name in fitted:
            lines[number] = f"  {name}: {fitted[name]:g}\n"
    PARAMETERS.write_text("".join(lines), encoding="utf-8")


def errors_of(cases: Sequence[Case], parameters: Mapping[str, float]) -> list[float]:
    """Relative errors of tokens/s."""
    return [case.predict(parameters) / (case.printed or 1) - 1 for case in cases]


def summary(errors: Sequence[float]) -> str:
    """Median, share within 30% and largest of relative errors, for a row of a table."""
    sizes = [abs(error) for error in errors]
    if not sizes:
        return "| | | |"
    within = sum(size <= 0.3 for size in sizes) / len(sizes)
    return f"{statistics.median(sizes):.1%} | {within:.0%} | {max(errors, key=abs):+.0%} |"


def curve(cases: Sequence[Case], parameters: Mapping[str, float]) -> list[str]:
    """Tokens/s of a device over that on one node, printed and predicted, for MPT on up to 128 A100 of 40 GB."""
    lines = ["| model | devices | of the rate on 8: printed | predicted |", "|---|---|---|---|"]
    chosen = [c for c in cases if c.row["model"].startswith("MPT") and c.device.name == "A100-40"]
    chosen = [c for c in chosen if c.settings.seq_len == 2048]
    for first in [c for c in chosen if c.sharding.launch.world_size == 8]:
        same = [c for c in chosen if c.row["model"] == first.row["model"] and c is not first]
        for case in sorted(same, key=lambda c: c.sharding.launch.world_size):
            printed = (case.printed or 0) / (first.printed or 1)
            predicted = case.predict(parameters) / first.predict(parameters)
            count = case.sharding.launch.world_size
            lines.append(f"| {case.row['model']} | {count} | {printed:.1%} | {predicted:.1%} |")
    return lines


def report(cases: Sequence[Case], others: Sequence[tuple[Row, str]], fit_on: Sequence[str]) -> tuple[str, dict]:
    """The tables in Markdown, and the figures of the JSON line."""
    parameters = load_parameters()
    timed = [case for case in cases if case.printed]
    known = [case for case in timed if repository(case.row) in fit_on]
    judged = [case for case in timed if case not in known]
    lines = ["| source | rows | used | median error of tokens/s | within 30% | largest |", "|---|---|---|---|---|---|"]
    for use, chosen in (("judged", judged), ("fitted on", known)):
        for name in dict.fromkeys(repository(case.row) for case in chosen):
            own = [case for case in chosen if repository(case.row) == name]
            lines.append(f"| {name} | {len(own)} | {use} | {summary(errors_of(own, parameters))}")
        lines.append(f"| **all** | {len(chosen)} | {use} | {summary(errors_of(chosen, parameters))}")
    lines += ["", *curve(timed, parameters), ""]
    compared = [case for case in cases if case.memory_bytes]
    errors = [(case.memory_bytes or 0) / GIB / float(case.row["peak_memory_gib"]) - 1 for case in compared]
    lines += ["| peak memory, planned against printed | error |", "|---|---|"]
    for case, error in zip(compared, errors, strict=True):
        note = case.row["notes"].split(";")[0]
        technique = f", {note.split(': ')[1]}" if note.startswith("cumulative") else ""
        lines.append(f"| {case.name}{technique} | {error:+.0%} |")
    median = statistics.median(map(abs, errors))
    lines += [f"| **median of {len(errors)}** | {median:.1%} |", "", "Rows that cannot be planned:", ""]
    reasons = [(repository(row), why) for row, why in others]
    reasons += [(repository(c.row), f"memory: {c.settings.no_memory}") for c in cases
                if c.row["peak_memory_gib"] and not c.memory_bytes]  # fmt: skip
    for (name, why), count in collections.Counter(reasons).items():
        lines.append(f"- {name}, {count} row{'s' if count > 1 else ''}: {why}.")
    sizes = [abs(error) for error in errors_of(judged, parameters)]
    return "\n".join(lines) + "\n", {
        "judged_rows": len(judged), "fitted_rows": len(known), "unexplained_rows": len(others),
        "median_error": statistics.median(sizes), "within_30_percent": sum(s <= 0.3 for s in sizes) / len(sizes),
        "median_error_fitted": statistics.median(map(abs, errors_of(known, parameters))),
        "memory_rows": len(errors), "memory_median_error": median,
    }  # fmt: skip


def main() -> int:
    """Compare, print the tables and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="PAGE", help="replace the tables in this page")
    parser.add_argument("--fit", action="store_true", help="fit the parameters and write them")
    parser.add_argument("--rows", action="store_true", help="print every row too")
    arguments = parser.parse_args()
    if not DATA.is_file():
        print(f"{DATA} is not here: there is nothing to compare with", file=sys.stderr)
        return 2
    warnings.simplefilter("ignore")
    with DATA.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    fit_on, _ = split(rows)
    cases, others = read_cases(rows)
    if arguments.fit:
        write_parameters(fit([case for case in cases if case.printed and repository(case.row) in fit_on]))
        load_parameters.cache_clear()
    for case in cases if arguments.rows else ():
        predicted = case.predict(load_parameters())
        error = f"{predicted / case.printed - 1:+.0%}" if case.printed else ""
        planned = f"{case.memory_bytes / GIB:.1f} GiB" if case.memory_bytes else ""
        print(f"{repository(case.row)[:24]:26}{case.name:58}{predicted:>10,.0f}{error:>7} {planned}")
    tables, found = report(cases, others, fit_on)
    print(tables)
    if arguments.write:
        page = arguments.write.read_text(encoding="utf-8")
        before, after = page.split(BEGIN)[0], page.split(END)[1]
        arguments.write.write_text(f"{before}{BEGIN}{tables}{END}{after}", encoding="utf-8")
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
