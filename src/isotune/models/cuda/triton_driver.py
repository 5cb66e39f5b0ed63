"""Whether Triton's kernels run here: triton comes with torch for CUDA, and needs the driver and a C compiler."""

import functools
import importlib.util
from typing import Any


@functools.cache
def triton_runs() -> bool:
    """Whether triton is installed and can launch a kernel on the current device; tried once."""
    if importlib.util.find_spec("triton") is None:
        return False
    from triton.runtime import driver

    try:
        active: Any = driver.active
        active.get_current_device()  # builds triton's launcher
    except Exception:
        return False
    return True
