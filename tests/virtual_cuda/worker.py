"""A process whose `cuda:0` is the virtual device: it calls the functions that it is told, one JSON line each.

python -m tests.virtual_cuda.worker FOLDER_OF_THE_BUILT_DEVICE
"""

import contextlib
import gc
import importlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from tests.virtual_cuda import device


def call(request: dict[str, Any]) -> Any:
    """The result of one function, which leaves no setting behind."""
    import torch

    variables = dict(os.environ)
    os.environ["ISOTUNE_CACHE"] = request["cache"]
    try:
        return getattr(importlib.import_module(request["module"]), request["function"])(**request["options"])
    finally:
        torch.use_deterministic_algorithms(False)
        os.environ.clear()
        os.environ.update(variables)


def main() -> None:
    """Answer until the input ends. What the functions print goes to stderr."""
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        device.install(Path(sys.argv[1]))
        importlib.import_module("tests.building")
        gc.collect()
        gc.freeze()  # the libraries, which no later collection has to pass through
        for line in sys.stdin:
            answer: dict[str, Any] = {}
            try:
                answer["result"] = call(json.loads(line))
            except BaseException:
                answer["error"] = traceback.format_exc()
            with contextlib.suppress(BrokenPipeError):
                print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
