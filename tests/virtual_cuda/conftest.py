"""`virtual(function, ...)` calls a function of a test module in a process that has the virtual device."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def virtual(request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    """Call it with a function of a module, and options that JSON can hold; returns what JSON makes of its result."""
    if not sys.platform.startswith("linux") or shutil.which("g++") is None:
        pytest.skip("the virtual device is compiled by g++ on Linux")
    built = request.config.cache.mkdir("virtual_cuda")
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["TRITON_INTERPRET"] = "1"  # read at triton's import: its kernels then run on any tensors
    command = [sys.executable, "-m", "tests.virtual_cuda.worker", str(built)]
    with tempfile.TemporaryFile("w+") as printed, tempfile.TemporaryDirectory() as cache:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=printed, text=True, cwd=REPOSITORY,
            env=environment,
        )  # fmt: skip
        assert process.stdin is not None and process.stdout is not None

        def call(function: Callable[..., Any], **options: Any) -> Any:
            asked = {"module": function.__module__, "function": function.__name__, "options": options, "cache": cache}
            print(json.dumps(asked), file=process.stdin, flush=True)
            answered = process.stdout.readline()
            if not answered:
                printed.seek(0)
                pytest.fail(f"the process of the virtual device ended:\n{printed.read()[-4000:]}")
            answer = json.loads(answered)
            if "error" in answer:
                pytest.fail(answer["error"])
            return answer["result"]

        yield call
        process.stdin.close()
        process.wait(60)
