"""What a CUDA machine has to say, in about eight minutes and without network: `make gpu`, or

    python -m tests.gpu.report                              # every stage, from the root of the checkout
    python -m tests.gpu.report --stages masks throughput    # some of them
    python -m tests.gpu.report --tiny                       # seconds, on any device: whether the report itself works

Each stage is a process with a time limit of its own, and what it finds is written as soon as it is there, to
OUTPUT/results.jsonl and OUTPUT/STAGE.txt, so that neither the limit nor a machine that goes away takes it. A missing
package is named, and what needs it is skipped. A table comes last, also as OUTPUT/table.md.

    packages    versions, the device, what is missing
    masks       dropout masks on the device against those on CPU, and against other neighbours
    bitwise     a training step of documents of 1,024 tokens twice: are loss and gradients the same bits?
    throughput  OPT-350M, full, LoRA and QLoRA, at three sizes of the microbatch: seconds, memory, share of the peak
    plan        the memory that `isotune plan` names against the allocator's, and its seconds, for the same runs
    profile     where the time of an update of LoRA goes: the costliest kernels, launches and copies
    tests       tests/gpu
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "accelerate", "peft", "trl", "datasets", "deepspeed", "bitsandbytes", "triton")
PACKAGES += ("flash-attn",)
# The limit of each stage; together 8 minutes and 20 seconds.
SECONDS = {"packages": 40, "masks": 40, "bitwise": 50, "throughput": 150, "plan": 50, "profile": 40, "tests": 130}
UPDATES, WARM_UP = 8, 3
TUNES = ("full", "lora", "qlora")


def main() -> int:
    """Run the stages one after the other, print what each found and the table; 1 where one failed."""
    given = read_arguments()
    output = Path(given.output)
    output.mkdir(parents=True, exist_ok=True)
    if given.stage:
        return run_stage(given.stage, output, given)
    results, failed = output / "results.jsonl", False
    others = [line for line in read_lines(results) if line["stage"] not in given.stages]  # of an earlier call
    results.write_text("".join(json.dumps(line) + "\n" for line in others))
    for stage in given.stages:
        command = [sys.executable, "-m", "tests.gpu.report", "--stage", stage, "--output", str(output)]
        started = time.perf_counter()
        seconds = given.seconds or SECONDS[stage] * (10 if given.tiny else 1)  # a busy CPU takes its time
        ended = run_within(seconds, [*command, *(["--tiny"] if given.tiny else [])], output / f"{stage}.txt")
        if ended.startswith("stopped"):
            with open(results, "a") as lines:
                lines.write(json.dumps({"stage": stage, "failed": ended}) + "\n")
        failed |= ended != "done"
        last = (output / f"{stage}.txt").read_text().strip().splitlines()[-1:]
        why = f": {last[0][:160]}" if last and ended.startswith("failed") else ""
        print(f"{stage:<12}{ended} in {time.perf_counter() - started:.0f} s{why}", flush=True)
    table = render(read_lines(results))
    (output / "table.md").write_text(table)
    print(f"\n{table}")
    return int(failed)


def run_within(seconds: float, command: list[str], log: Path) -> str:
    """Run `command` with its output in `log`, and say how it ended; what it started ends with it at the limit."""
    with open(log, "w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = process.wait(seconds)
            return "done" if status == 0 else f"failed with status {status}"
        except subprocess.TimeoutExpired:
            return f"stopped after {seconds} s"
        finally:
            with contextlib.suppress(ProcessLookupError):  # pytest too would hold the device
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def read_lines(results: Path) -> list[dict[str, Any]]:
    """The results so far."""
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="gpu-report", help="folder of the results; default %(default)s")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--seconds", type=int, help="limit of each stage, instead of its own")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on whatever device there is")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    return parser.parse_args()


def run_stage(stage: str, output: Path, given: argparse.Namespace) -> int:
    """One stage in this process; each of its results becomes a line as soon as it is there."""
    with open(output / "results.jsonl", "a") as results:
        try:
            for result in STAGES[stage](given.tiny):
                print(json.dumps(result), flush=True)
                results.write(json.dumps({"stage": stage, **result}) + "\n")
                results.flush()
        except ImportError as error:
            results.write(json.dumps({"stage": stage, "skipped": f"{error.name or error} is missing"}) + "\n")
            print(f"skipped: {error}")
        except Exception:
            results.write(json.dumps({"stage": stage, "failed": traceback.format_exc(limit=-3)}) + "\n")
            raise
    return 0


def packages(tiny: bool) -> Iterator[dict[str, Any]]:
    """Versions and device."""
    import torch

    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        versions[name] = None
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else "no CUDA device"
    memory = torch.cuda.get_device_properties(0).total_memory if cuda else 0
    missing = [name for name, version in versions.items() if version is None]
    yield {"device": device, "memory_bytes": memory, "python": sys.version.split()[0], "versions": versions}
    yield {"missing": missing}


def masks(tiny: bool) -> Iterator[dict[str, Any]]:
    """Dropout masks by document."""
    import torch

    from isotune.models.cpu import functional as on_cpu
    from isotune.models.cuda import dropout as on_cuda
    from isotune.models.document_keys import MicrobatchDocuments, known_documents

    device = "cuda" if torch.cuda.is_available() else "cpu"
    row = MicrobatchDocuments([3, 1_000_000, 7], [500, 1, 523])

    def drop(drop: Callable[..., torch.Tensor], x: torch.Tensor, documents: MicrobatchDocuments) -> torch.Tensor:
        torch.manual_seed(5)
        with known_documents(documents):
            return drop(x, 0.1)

    for dtype in (torch.float32, torch.bfloat16):
        for shape in ((1, 1024, 1024), (1024, 513), (3, 768)):
            x = torch.randn(shape).to(dtype)
            expected, found = drop(on_cpu.dropout, x, row), drop(on_cuda.dropout, x.to(device), row).cpu()
            yield {"shape": list(shape), "dtype": str(dtype), "equals_cpu": bool(torch.equal(found, expected))}
    x = torch.randn(1, 1024, 256, device=device)
    last = drop(on_cuda.dropout, x, row)[:, 501:]
    alone = drop(on_cuda.dropout, x[:, 501:], MicrobatchDocuments([7], [523]))
    yield {"alone_equals_packed": bool(torch.equal(last, alone))}
    if device == "cuda":
        big, seconds = torch.randn(1, 16384, 1024, device=device, dtype=torch.bfloat16), []
        many = MicrobatchDocuments(range(64), [256] * 64)
        stock = torch.nn.functional.dropout
        for function in (lambda: stock(big, 0.1), lambda: drop(on_cuda.dropout, big, many)):
            function()
            torch.cuda.synchronize()
            started = time.perf_counter()
            for _ in range(50):
                function()
            torch.cuda.synchronize()
            seconds.append((time.perf_counter() - started) / 50)
        yield {"elements": big.numel(), "torch_seconds": seconds[0], "document_seconds": seconds[1]}


def built_run(folder: Path, tiny: bool, **values: Any) -> Any:
    """A run of OPT-350M's geometry with random weights on built-in conversations, packed; or a tiny one."""
    import torch
    from tests.building import OPT_350M, build
    from transformers import AutoModelForCausalLM, OPTConfig

    from isotune.models.base.builtin import builtin_tokenizer

    shared: dict[str, Any] = {"dataset_name": "builtin:capitals", "max_seq_length": 1024, "global_batch_size": 32}
    shared |= {"max_steps": UPDATES, "save_strategy": "no", "bf16": True, "gradient_checkpointing": False}
    if tiny:
        return build(folder, **{**shared, "max_seq_length": 128, "global_batch_size": 4, "bf16": False, **values})
    place = Path(tempfile.gettempdir()) / "isotune-gpu-report-opt-350m"
    if not (place / "config.json").exists():
        with torch.device("cuda"):
            model = AutoModelForCausalLM.from_config(OPTConfig(**OPT_350M, vocab_size=50272), dtype=torch.bfloat16)
        model.save_pretrained(place)
        builtin_tokenizer("builtin:opt-tiny").save_pretrained(place)
        del model
        torch.cuda.empty_cache()
    return build(folder, **{**shared, "model_name_or_path": str(place), **values})


def long_conversations(file: Path, tokens: int) -> str:
    """Eight conversations of nearly so many tokens each; where documents are shorter than a kernel's block of keys, a
    kernel that sums in no fixed order repeats by luck."""
    from isotune.models.base.builtin import builtin_tokenizer

    tokenizer, lines = builtin_tokenizer("builtin:opt-tiny"), []
    for number in range(8):
        text, words = f"### Human: Count from {number}.### Assistant:", 0
        while len(tokenizer(text).input_ids) < tokens - 24:
            text += f" {number * 1000 + words}"
            words += 1
        lines.append(json.dumps({"text": text}))
    file.write_text("\n".join(lines) + "\n")
    return str(file)


def bitwise(tiny: bool) -> Iterator[dict[str, Any]]:
    """The same update twice, dropout on."""
    import torch

    for tune in ("full", "lora"):
        with tempfile.TemporaryDirectory() as folder:
            rows = long_conversations(Path(folder) / "long.jsonl", 128 if tiny else 1024)
            values: dict[str, Any] = {"dataset_name": rows, "global_batch_size": 4, "microbatch_tokens": 1024}
            built = built_run(Path(folder), tiny, tune=tune, exact_gradients=True, **values)
            item, found = next(iter(built.trainer.get_train_dataloader())), []
            for _ in range(2):
                built.model.zero_grad()
                loss = built.trainer.training_step(built.model, item)
                gradients = {n: p.grad.clone() for n, p in built.model.named_parameters() if p.grad is not None}
                found.append((float(loss), gradients))
            (loss, one), (again, other) = found
            differing = [name for name, gradient in one.items() if not torch.equal(gradient, other[name])]
            longest = max(built.trainer.plan.documents.documents.lengths.tolist())
            yield {"tune": tune, "longest_document": longest, "same_loss": loss == again,
                   "gradients": len(one), "differing": len(differing), "for_instance": differing[:3]}  # fmt: skip


def builds(tiny: bool) -> Iterator[tuple[str, int, Any]]:
    """Each way of tuning at three sizes of the microbatch, and its run."""
    from isotune.io.errors import UserError

    for tune in TUNES:
        for tokens in (128, 256) if tiny else (1024, 8192, 32_768):
            with tempfile.TemporaryDirectory() as folder:
                try:
                    built = built_run(Path(folder), tiny, tune=tune, microbatch_tokens=tokens)
                except (ImportError, UserError) as error:  # QLoRA without bitsandbytes
                    print(f"{tune}: {error}")
                    break
                yield tune, tokens, built
                del built


def runs(tiny: bool) -> Iterator[tuple[str, int, Any, list[dict[str, Any]]]]:
    """The same, trained: the run, and its lines after the warm-up."""
    from isotune.io.errors import UserError

    for tune, tokens, built in builds(tiny):
        try:
            built.train()
        except UserError as error:
            print(f"{tune}, {tokens} tokens: {error}")
            continue
        yield tune, tokens, built, built.steps[WARM_UP:]
        del built


def throughput(tiny: bool) -> Iterator[dict[str, Any]]:
    """Seconds, tokens and memory of whole updates."""
    for tune, tokens, built, lines in runs(tiny):
        yield {
            "tune": tune,
            "microbatch_tokens": tokens,
            "kernel": json.loads((built.run.path / "environment.json").read_text())["in_effect"]["attention_kernel"],
            "step_seconds": statistics.median(line["step_seconds"] for line in lines),
            "tokens_per_second": statistics.median(line["tokens_per_second"] for line in lines),
            "peak_memory_bytes": max(line["peak_memory_bytes"] for line in lines),
        }


def plan(tiny: bool) -> Iterator[dict[str, Any]]:
    """What the plan says of the same runs."""
    import torch

    from isotune.preflight.preflight_report import run_preflight
    from isotune.preflight.request import PLAIN, Launch, PreflightRequest
    from isotune.preflight.resources.devices import DEVICES

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    device = next((device for device in DEVICES if device.name.lower() in name.lower().replace(" ", "")), DEVICES[0])
    for tune, tokens, built in builds(tiny):
        found = run_preflight(PreflightRequest(built.recipe, Launch(PLAIN, 1), ()), device=device, show_progress=False)
        assert found.time is not None
        memory = found.memory.total - found.memory.margin
        yield {"tune": tune, "microbatch_tokens": tokens, "planned_bytes": memory, "device": device.name,
               "seconds_at_peak": found.time.floor}  # fmt: skip
        del built


def profile(tiny: bool) -> Iterator[dict[str, Any]]:
    """Kernels, launches and copies of one update."""
    import torch
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    with tempfile.TemporaryDirectory() as folder:
        built = built_run(Path(folder), tiny, tune="lora", microbatch_tokens=128 if tiny else 8192)
        item = next(iter(built.trainer.get_train_dataloader()))
        built.trainer.training_step(built.model, item)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        with profiled(activities=activities) as seen:
            built.trainer.training_step(built.model, item)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        events = seen.key_averages()
        print(events.table(sort_by="self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total",
                           row_limit=30, max_name_column_width=60))  # fmt: skip
        counts = {event.key: event.count for event in events}
        yield {
            "launches": sum(n for key, n in counts.items() if key.startswith(("cudaLaunchKernel", "cuLaunchKernel"))),
            "copies": sum(n for key, n in counts.items() if key.startswith("cudaMemcpyAsync")),
            "synchronisations": sum(n for key, n in counts.items() if "Synchronize" in key),
            "microbatches": len(item["microbatches"]),
        }


def tests(tiny: bool) -> Iterator[dict[str, Any]]:
    """pytest over tests/gpu."""
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-v", "--durations=10", "-p", "no:cacheprovider"]
    lines = list[str]()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as pytest:
        assert pytest.stdout is not None
        for line in pytest.stdout:  # at the limit the log has every test that ended
            print(line, end="", flush=True)
            lines.append(line.strip())
    lines = [line for line in lines if line]
    yield {"status": pytest.returncode, "summary": lines[-1] if lines else "", "failed": [
        line.split(" ", 1)[1] for line in lines if line.startswith(("FAILED", "ERROR"))
    ]}  # fmt: skip


STAGES: dict[str, Callable[[bool], Iterator[dict[str, Any]]]] = {
    "packages": packages, "masks": masks, "bitwise": bitwise, "throughput": throughput, "plan": plan,
    "profile": profile, "tests": tests,
}  # fmt: skip


def render(found: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    by_stage: dict[str, list[dict[str, Any]]] = {stage: [] for stage in STAGES}
    for result in found:
        by_stage[result["stage"]].append(result)
    lines = []
    for result in by_stage["packages"]:
        if "device" in result:
            versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
            lines += [f"**{result['device']}**, {result['memory_bytes'] / 1e9:.1f} GB; {versions}", ""]
        elif result["missing"]:
            lines += [f"Missing: {', '.join(result['missing'])}", ""]
    planned = {(r["tune"], r["microbatch_tokens"]): r for r in by_stage["plan"] if "tune" in r}
    rows = [result for result in by_stage["throughput"] if "tune" in result]
    if rows:
        names = (
            "tuning",
            "microbatch tokens",
            "s a step",
            "tokens/s",
            "share of peak",
            "peak GB",
            "planned GB",
            "kernel",
        )
        lines += [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for row in rows:
        other = planned.get((row["tune"], row["microbatch_tokens"]))
        share = f"{other['seconds_at_peak'] / row['step_seconds']:.0%}" if other else ""
        memory = f"{other['planned_bytes'] / 1e9:.2f}" if other else ""
        lines.append(
            f"| {row['tune']} | {row['microbatch_tokens']:,} | {row['step_seconds']:.3f} "
            f"| {row['tokens_per_second']:,.0f} | {share} | {row['peak_memory_bytes'] / 1e9:.2f} | {memory} "
            f"| {row['kernel']} |"
        )
    lines.append("")
    ends = [result for result in found if "skipped" in result or isinstance(result.get("failed"), str)]
    for stage in ("masks", "bitwise", "profile", "tests"):
        lines += [
            f"- {stage}: " + json.dumps({k: v for k, v in result.items() if k != "stage"})
            for result in by_stage[stage]
            if result not in ends
        ]
    for result in ends:
        lines.append(f"- {result['stage']}: {result.get('skipped') or result['failed'].strip().splitlines()[-1]}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
