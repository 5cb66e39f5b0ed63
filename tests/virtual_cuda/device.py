"""The virtual CUDA device: builds and loads device.cpp, and answers for the driver that torch.cuda would ask.

Import it before torch, in a process of its own, and call `install`: torch asks once which devices there are.
"""

import collections
import contextlib
import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import subprocess
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

SOURCE = Path(__file__).with_name("device.cpp")
MEMORY = 80 << 30  # bytes

_library: Any = None


def build(folder: Path) -> Path:
    """The compiled device, which is kept in `folder` for as long as the source and torch are the same."""
    version = importlib.metadata.version("torch")
    key = hashlib.sha256(SOURCE.read_bytes() + version.encode()).hexdigest()[:16]
    built = folder / f"device-{key}.so"
    if built.exists():
        return built
    torch = importlib.util.find_spec("torch")
    assert torch is not None and torch.origin is not None
    root = Path(torch.origin).parent
    includes = [f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}"]
    links = [f"-L{root / 'lib'}", "-Wl,--no-as-needed", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{root / 'lib'}"]
    unfinished = folder / f"{built.name}.{os.getpid()}"
    command = ["g++", "-O1", "-std=c++20", "-shared", "-fPIC", "-w", *includes, str(SOURCE), "-o", str(unfinished)]
    subprocess.run([*command, *links], check=True)
    unfinished.replace(built)  # two processes may build at once
    return built


def installed() -> bool:
    """Whether this process has the virtual device."""
    return _library is not None


def install(folder: Path) -> None:
    """Make `cuda:0` of this process the virtual device."""
    global _library
    _library = ctypes.CDLL(str(build(folder)))
    _library.virtual_seed.argtypes = [ctypes.c_uint64]
    _library.virtual_limit.argtypes = [ctypes.c_size_t]
    for name in ("virtual_launches", "virtual_allocated", "virtual_peak"):
        getattr(_library, name).restype = ctypes.c_size_t
    _library.virtual_install()
    import bitsandbytes  # noqa: F401  (looks for CUDA's libraries where there is a device; its CPU form serves here)

    _answer_for_the_driver()
    from tests.virtual_cuda import kernels

    kernels.register()


def _answer_for_the_driver() -> None:
    import torch

    properties = SimpleNamespace(name="virtual H100", major=9, minor=0, total_memory=MEMORY, multi_processor_count=132)
    stream = SimpleNamespace(synchronize=lambda: note("wait", "Stream.synchronize"))
    seed = lambda number: _library.virtual_seed(number % 2**64)  # noqa: E731
    answers = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "init": lambda: None,
        "_lazy_init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "_exchange_device": lambda device: 0,
        "_maybe_exchange_device": lambda device: 0,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: note("wait", "torch.cuda.synchronize"),
        "empty_cache": lambda: None,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: properties.name,
        "get_device_properties": lambda device=None: properties,
        "is_bf16_supported": lambda including_emulation=True: True,
        "mem_get_info": lambda device=None: (MEMORY - _library.virtual_allocated(), MEMORY),
        "memory_allocated": lambda device=None: _library.virtual_allocated(),
        "memory_reserved": lambda device=None: _library.virtual_allocated(),
        "max_memory_allocated": lambda device=None: _library.virtual_peak(),
        "max_memory_reserved": lambda device=None: _library.virtual_peak(),
        "reset_peak_memory_stats": lambda device=None: _library.virtual_reset_peak(),
        "current_stream": lambda device=None: stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "manual_seed": seed,
        "manual_seed_all": seed,
        "get_rng_state_all": list,
        "set_rng_state_all": lambda states: None,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    torch.backends.cuda.is_flash_attention_available = lambda: True
    torch.version.cuda = "13.0"  # type: ignore[assignment]  (a CPU build says None)
    torch._C._cuda_getDevice = lambda: 0  # type: ignore[attr-defined]  (not in a CPU build)
    torch.cuda.random.set_rng_state_all = torch.cuda.set_rng_state_all
    torch.cuda.memory.reset_peak_memory_stats = torch.cuda.reset_peak_memory_stats


def limit_memory(total: int) -> None:
    """Let allocations beyond `total` bytes raise torch.OutOfMemoryError; 0: none does."""
    _library.virtual_limit(total)


@dataclass
class Counts:
    """What a stretch of the program asked of the device, each with the line that asked."""

    waits: collections.Counter = field(default_factory=collections.Counter)
    to_device: collections.Counter = field(default_factory=collections.Counter)
    to_host: collections.Counter = field(default_factory=collections.Counter)
    launches: collections.Counter = field(default_factory=collections.Counter)

    def as_dict(self) -> dict[str, dict[str, int]]:
        """The same for JSON."""
        return {kind: dict(getattr(self, kind)) for kind in ("waits", "to_device", "to_host", "launches")}


_counts: Counts | None = None
_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p)


@_CALLBACK
def _observer(kind: bytes, name: bytes) -> None:
    note(kind.decode(), name.decode())


def note(kind: str, name: str) -> None:
    if _counts is None:
        return
    if kind == "launch":
        _counts.launches[name] += 1
    else:
        {"wait": _counts.waits, "to_device": _counts.to_device, "to_host": _counts.to_host}[kind][
            f"{name} {_line()}"
        ] += 1


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Count nothing within it: what one kernel of a GPU does in one launch takes several operators here."""
    global _counts
    before, _counts = _counts, None
    try:
        yield
    finally:
        _counts = before


def _line() -> str:
    """The innermost line of the project, and of any library below it, on this thread's stack."""
    frames = [frame for frame in traceback.extract_stack() if "virtual_cuda" not in frame.filename]
    ours = [f for f in frames if "/isotune/" in f.filename]
    place = lambda frame: f"{'/'.join(Path(frame.filename).parts[-2:])}:{frame.lineno}"  # noqa: E731
    return " < ".join(place(frame) for frame in (ours[-1:] or []) + frames[-1:])


@contextlib.contextmanager
def counting() -> Iterator[Counts]:
    """Count what is asked of the device within it, on every thread."""
    global _counts
    _counts = counts = Counts()
    _library.virtual_observe(_observer)
    try:
        yield counts
    finally:
        _counts = None
        _library.virtual_observe(None)
