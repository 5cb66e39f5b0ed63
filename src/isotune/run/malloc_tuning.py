"""glibc malloc settings that reduce heap fragmentation on CPU, set by restarting the process.

torch aligns every tensor to 64 bytes. glibc 2.36 cuts an aligned block out of one that is up to 96 bytes larger and
keeps the remainders in its caches for small objects. Remainders in a cache do not merge with a freed neighbour, so a
gap can be just too small for the next tensor of the same size, and gradients cannot reuse the memory of activations
(docs/benchmarks.md). glibc reads its settings only at the start of a process, so a script calls
`restart_with_malloc_tuning` before anything else; this module imports nothing heavy.
"""

import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path

VARIABLE = "GLIBC_TUNABLES"
TUNABLES = {"glibc.malloc.tcache_count": "0", "glibc.malloc.mxfast": "0"}
GPU_DRIVERS = (Path("/dev/nvidiactl"), Path("/dev/kfd"))


def restart_with_malloc_tuning() -> None:
    """Restart this Python process with `malloc_tunables`: the same command line, the same process id.

    Returns where there is nothing to set, and where the script runs inside another program (runpy, a test), which a
    restart would end.
    """
    tunables = malloc_tunables(os.environ)
    if tunables is None or not _is_the_program() or not sys.executable:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, VARIABLE: tunables})


def _is_the_program() -> bool:
    """Whether this is what the command line started, as a script or as `-m MODULE`."""
    given, started = sys.argv, sys.orig_argv
    if started[-len(given) :] == given:
        return True
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec is not None and started[-len(given) - 1 :] == ["-m", spec.name, *given[1:]]


def malloc_tunables(environment: Mapping[str, str]) -> str | None:
    """GLIBC_TUNABLES for a process with this environment.

    None where nothing should be set: it is set already, the user has set one of the tunables, the C library is not
    glibc, or there is a GPU, whose tensors are not in this heap.
    """
    given = environment.get(VARIABLE, "")
    if any(name in given for name in TUNABLES) or platform.libc_ver()[0] != "glibc":
        return None
    if any(driver.exists() for driver in GPU_DRIVERS):
        return None
    return ":".join([*([given] if given else []), *(f"{name}={value}" for name, value in TUNABLES.items())])
