"""`isotune doctor`: check a machine on every process of a launch, and print one table.

Each check is a generator of findings about the process that calls it and its node: the result, its consequence, and how
to fix it. It never raises: a check that fails is a finding too.
"""

import json
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import reduce
from packaging.requirements import Requirement
from packaging.version import Version

from isotune import __version__
from isotune.data.cache import cache_folder
from isotune.data.sources.hub_access import hub_answers
from isotune.distributed.device import choose_device
from isotune.evaluation.distributed_eval import Ranks, start_ranks
from isotune.io.extras import EXTRAS
from isotune.io.shipped import IS_CHECKOUT, ROOT
from isotune.models.attention_form import AttentionForm
from isotune.models.cpu.document_attention import document_attention
from isotune.models.packed_attention import last_kernel, packed_attention

OK, NOTE, WRONG = "ok", "note", "WRONG"
KERNEL_TOLERANCE = 2e-2  # of bf16, with 8 bits of precision, over sums of a hundred elements
MIN_FREE_BYTES = 20 * 2**30
SLOW_SYNC_SECONDS = 0.5
MESSAGE_BYTES = 64 * 2**20
SLOW_BYTES_PER_SECOND = 1e8
ROUNDS = 3
_CONSTRAINTS = ROOT / "constraints.txt"
_REINSTALL = "pip install -c constraints.txt -e ." if IS_CHECKOUT else f"pip install -c '{_CONSTRAINTS}' isotune"


@dataclass(frozen=True)
class Finding:
    """One line of the table: `status` is OK, NOTE or WRONG; `consequence` and `fix` are empty for OK."""

    status: str
    subject: str
    result: str
    consequence: str = ""
    fix: str = ""


def run_doctor(output: Path, *, as_json: bool = False) -> int:
    """Run all checks on every process and print one table, or JSON for a report of a bug.

    The exit status is 1 if anything is WRONG, otherwise 0.
    """
    ranks = start_ranks()
    checks = (versions(), extras(), device(), kernels(), compilers(), disk(output), caches(), hub(), scheduler())
    findings = [finding for check in (*checks, all_reduce(ranks)) for finding in check]
    findings_of = ranks.gather({ranks.rank: findings}, ranks.world_size)
    if ranks.is_main:
        print(format_json(findings_of) if as_json else format_table(findings_of))
    return int(any(finding.status == WRONG for findings in findings_of.values() for finding in findings))


def format_table(findings_of: dict[int, list[Finding]]) -> str:
    """One line per finding, with its ranks; findings that several ranks share appear once."""
    ranks_of: dict[Finding, set[int]] = {}
    for rank, findings in findings_of.items():
        for finding in findings:
            # times differ between ranks: the first rank's result represents all
            is_same = (known for known in ranks_of if known.subject == finding.subject and known.status == OK)
            key = next(is_same, finding) if finding.status == OK else finding
            ranks_of.setdefault(key, set()).add(rank)
    lines = []
    for f, ranks in ranks_of.items():
        where = "" if len(ranks) == len(findings_of) else f" (rank {', '.join(map(str, sorted(ranks)))})"
        explanation = f": {f.consequence}; {f.fix}" if f.consequence else ""
        lines.append(f"{f.status:<6}{f.subject:<16}{f.result}{where}{explanation}")
    wrong = sum(line.startswith(WRONG) for line in lines)
    lines.append(f"{wrong} wrong, {sum(line.startswith(NOTE) for line in lines)} to note")
    return "\n".join(lines)


def format_json(findings_of: dict[int, list[Finding]]) -> str:
    """All findings of every rank, with the versions of what computes; no path but those that a finding names."""
    names = {Requirement(line).name for line in metadata.requires("isotune") or ()}
    content = {
        "isotune": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "installed": {name: version for name in sorted(names) if (version := _installed(name)) is not None},
        "findings": [{"rank": rank, **asdict(f)} for rank, findings in findings_of.items() for f in findings],
    }
    return json.dumps(content, indent=2)


def versions() -> Iterator[Finding]:
    """Installed libraries against the ranges of isotune's metadata and the versions that were tested together.

    The packages of an extra may be missing.
    """
    tested = _tested_together()
    differing = []
    for line in metadata.requires("isotune") or ():
        requirement = Requirement(line)
        applies = {extra: _applies(requirement, extra) for extra in ("", *EXTRAS.values())}
        version = _installed(requirement.name)
        if version is None and applies[""]:
            fix = f"pip install '{line}'"
            differing.append(Finding(WRONG, requirement.name, "not installed", "runs need it", fix))
        if version is None or not any(applies.values()):
            continue
        installed = Version(version)
        pinned = tested.get(requirement.name.lower())
        if not requirement.specifier.contains(installed, prereleases=True):
            outside = f"{installed}, outside {requirement.specifier}"
            differing.append(Finding(WRONG, requirement.name, outside, "its interface may differ", _REINSTALL))
        elif pinned and installed.release != pinned.release:
            other = f"{installed}; {pinned} was tested"
            differing.append(Finding(NOTE, requirement.name, other, "results may differ in rounding", _REINSTALL))
    yield from differing or [Finding(OK, "versions", "within the ranges, and as tested together")]


def extras() -> Iterator[Finding]:
    """Which packages that only some uses need are there."""
    missing = sorted({extra for package, extra in EXTRAS.items() if find_spec(package) is None})
    there = sorted({*EXTRAS.values()} - {*missing})
    result = f"{', '.join(there) or 'none'} installed"
    if missing:
        result += f"; pip install 'isotune[{','.join(missing)}]' adds the others"
    yield Finding(OK, "extras", result)


def device() -> Iterator[Finding]:
    """torch, its CUDA version and the driver, and whether torch sees the GPU."""
    built = torch.version.cuda or torch.version.hip
    if torch.cuda.is_available():
        gpus = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
        yield Finding(OK, "device", f"{gpus}, torch {torch.__version__}, CUDA {built}")
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            consequence = "bf16 recipes would be emulated or refused"
            yield Finding(NOTE, "bf16", "not supported by this GPU", consequence, "fp16: true")
    elif driver := _driver_version():
        yield Finding(WRONG, "device", f"a GPU with driver {driver} that torch {torch.__version__} does not see",
                      "training would run on the CPU, a hundred times slower",
                      "install a torch built for your CUDA" if built is None else "update the driver")  # fmt: skip
    elif choose_device() == "mps":
        what = f"MPS, torch {torch.__version__}"
        yield Finding(NOTE, "device", what, "nobody has measured isotune on it", "device: cpu is measured, and slower")
    else:
        yield Finding(OK, "device", f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}")


def kernels() -> Iterator[Finding]:
    """The attention kernel of a bf16 run on two small documents, against plain attention in fp32."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    bounds = [0, 37, 101]
    inputs = [torch.randn(1, 4, bounds[-1], 64).bfloat16() for _ in range(3)]
    try:
        starts = torch.tensor(bounds, dtype=torch.int32, device=device)
        documents: Any = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 64, "max_length_k": 64}
        query, key, value = (t.to(device) for t in inputs)
        output, _ = packed_attention(torch.nn.Module(), query, key, value, None, is_causal=True, **documents)
        query, key, value = (t.float() for t in inputs)
        exact = document_attention(query, key, value, bounds, AttentionForm(64**-0.5, True))
    except Exception as error:
        yield Finding(WRONG, "attention", f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
                      "packed training cannot start", "another torch build, or fp32")  # fmt: skip
        return
    name = last_kernel()
    distance = float((output.float().cpu() - exact).abs().max())
    if distance > KERNEL_TOLERANCE:
        yield Finding(WRONG, "attention", f"{name} differs from fp32 by {distance:.2g}", "it computes wrong results",
                      "another torch build; report it")  # fmt: skip
    else:
        yield Finding(OK, "attention", f"{name}, within {distance:.1g} of fp32")


def compilers() -> Iterator[Finding]:
    """Whether DeepSpeed could compile its operations, and locks that a killed build left behind."""
    installed = [name for name in ("c++", "g++", "clang++") if shutil.which(name)]
    if shutil.which("ninja") and installed:
        yield Finding(OK, "compiler", f"{installed[0]} and ninja: DeepSpeed can build its own operations")
    else:
        missing = "ninja" if installed else "a C++ compiler"
        yield Finding(NOTE, "compiler", f"{missing} is missing", "only NVMe offload and DeepSpeed's own Adam need it",
                      "nothing, with the shipped configurations")  # fmt: skip
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")
    for lock in sorted(folder.glob("**/lock")):
        yield Finding(WRONG, "lock", str(lock), "a killed build left it, and every later build waits for it forever",
                      f"rm '{lock}' while no build runs")  # fmt: skip


def disk(folder: Path) -> Iterator[Finding]:
    """Free space and the speed of a synced write in the output folder."""
    place = _existing_parent(folder)
    free = shutil.disk_usage(place).free
    try:
        with tempfile.NamedTemporaryFile(dir=place) as file:
            started = time.perf_counter()
            file.write(os.urandom(2**22))
            file.flush()
            os.fsync(file.fileno())
            seconds = time.perf_counter() - started
    except OSError as error:
        result = f"{place}: {error.strerror}"
        yield Finding(WRONG, "output", result, "a run cannot write its results", "another --output_dir")
        return
    result = f"{place}: {free / 2**30:.0f} GiB free, 4 MiB written and synced in {seconds:.3f} s"
    if seconds > SLOW_SYNC_SECONDS:
        yield Finding(NOTE, "output", result, "checkpoints wait for the disk", "a faster file system for --output_dir")
    elif free < MIN_FREE_BYTES:
        yield Finding(NOTE, "output", result, "checkpoints of a large model may not fit", "isotune plan says how much")
    else:
        yield Finding(OK, "output", result)


def caches() -> Iterator[Finding]:
    """The cache folders of prepared data and downloads."""
    from huggingface_hub.constants import HF_HOME

    folders = (("prepared data", "ISOTUNE_CACHE", cache_folder()), ("downloads", "HF_HOME", Path(HF_HOME)))
    for name, variable, folder in folders:
        if os.access(_existing_parent(folder), os.W_OK):
            yield Finding(OK, name, str(folder))
        else:
            yield Finding(WRONG, name, f"{folder} is not writable", "data cannot be prepared or downloaded",
                          f"export {variable}=a writable folder")  # fmt: skip


def hub() -> Iterator[Finding]:
    """Whether the Hugging Face Hub is reachable, or offline mode is on."""
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "ON", "YES"):
        yield Finding(OK, "Hub", "offline by HF_HUB_OFFLINE: cached files only")
    elif hub_answers():
        yield Finding(OK, "Hub", "reachable")
    else:
        yield Finding(NOTE, "Hub", "not reachable", "Hub names fail at once", "local paths, builtin: names, or a cache")


def scheduler(environment: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Whether SLURM and the launcher agree on nodes, processes and threads."""
    if "SLURM_JOB_ID" not in environment:
        return
    world, nodes = int(environment.get("WORLD_SIZE", "1")), int(environment.get("SLURM_NNODES", "1"))
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if "WORLD_SIZE" not in environment and tasks > 1:
        yield Finding(WRONG, "SLURM", f"{tasks} independent tasks", "each would train alone",
                      "one accelerate launch per node: see slurm/")  # fmt: skip
    elif world % nodes:
        yield Finding(WRONG, "SLURM", f"{world} processes on {nodes} nodes", "one node would wait forever",
                      "num_processes counts the processes of all nodes")  # fmt: skip
    else:
        yield Finding(OK, "SLURM", f"job {environment['SLURM_JOB_ID']}, {nodes} nodes, {world} processes")
    cores, threads = environment.get("SLURM_CPUS_PER_TASK"), environment.get("OMP_NUM_THREADS")
    if cores and threads and int(threads) > int(cores):
        yield Finding(NOTE, "threads", f"OMP_NUM_THREADS {threads} on {cores} cores a task", "threads compete",
                      f"export OMP_NUM_THREADS={cores}")  # fmt: skip


def all_reduce(ranks: Ranks) -> Iterator[Finding]:
    """The bandwidth of an all-reduce: bytes that a process sends per second, the best of three rounds."""
    if ranks.world_size == 1:
        return
    message = torch.ones(MESSAGE_BYTES // 4, device=ranks.device)
    best_seconds = float("inf")
    total: Any = message
    for _ in range(ROUNDS + 1):  # the first round opens the connections
        started = time.perf_counter()
        total = reduce(message, reduction="sum")
        if ranks.device.type == "cuda":
            torch.cuda.synchronize()
        best_seconds = min(best_seconds, time.perf_counter() - started)
    rate = 2 * (ranks.world_size - 1) / ranks.world_size * MESSAGE_BYTES / best_seconds
    result = f"{ranks.world_size} processes, {rate / 1e9:.2f} GB/s"
    if float(total[0]) != ranks.world_size:
        yield Finding(WRONG, "all-reduce", f"the sum of ones is {float(total[0])}", "gradients would be wrong",
                      "check the network; NCCL_DEBUG=INFO")  # fmt: skip
    elif rate < SLOW_BYTES_PER_SECOND:
        yield Finding(NOTE, "all-reduce", result, "steps would wait for gradients",
                      "name the fast network interface in NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME")  # fmt: skip
    else:
        yield Finding(OK, "all-reduce", result)


def _applies(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _existing_parent(path: Path) -> Path:
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def _tested_together() -> dict[str, Version]:
    """The pins of the checkout's constraints.txt; empty for an installed package."""
    if not _CONSTRAINTS.is_file():
        return {}
    lines = (line.split("#")[0].strip() for line in _CONSTRAINTS.read_text(encoding="utf-8").splitlines())
    return {name.lower(): Version(version) for name, _, version in (line.partition("==") for line in lines) if version}


def _driver_version() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        printed = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return printed[0] if printed else None
