"""The parent's view of a side's process, and the data that the sides share."""

import argparse
import contextlib
import multiprocessing
import os
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

from isotune.run.malloc_tuning import VARIABLE, malloc_tunables
from sft_sides.process import run_side

DATA = Path(os.environ.get("ISOTUNE_TEST_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
ANSWER_SECONDS = 1_800


class Side:
    """A side's process as the parent sees it.

    Raises:
        SideFailed: it cannot be built, now or in `steps`.
    """

    def __init__(
        self, name: str, mode: str, given: argparse.Namespace, scratch: str, module: str | None = None
    ) -> None:
        self.name = name
        self.log = Path(scratch) / f"{mode}-{name}.log"
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=run_side, args=(theirs, name, mode, given, scratch, module), daemon=True)
        with mock.patch.dict(os.environ, heap_of(name)):
            self.process.start()
        theirs.close()
        self.facts = self._answer(self.pipe)

    def steps(self, number: int) -> dict[str, Any]:
        """Let it train; its answer has `seconds` of every step and `peak_memory_bytes`."""
        self.pipe.send(number)
        return self._answer(self.pipe)

    def _answer(self, pipe: Connection) -> dict[str, Any]:
        try:
            if not pipe.poll(ANSWER_SECONDS):
                raise SideFailed(f"no answer within {ANSWER_SECONDS} s")
            answer = pipe.recv()
        except EOFError:
            self.process.join()
            raise SideFailed(f"its process ended with {self.process.exitcode} (-9: out of memory?)") from None
        if "failed" in answer:
            raise SideFailed(answer["failed"])
        return answer

    def close(self) -> None:
        """End its process, kindly first: a killed one leaves its semaphores to the resource tracker's complaints."""
        with contextlib.suppress(OSError):  # it may have failed and gone
            self.pipe.send(0)
        self.process.join(timeout=30)
        self.process.kill()
        self.process.join()


def heap_of(side: str) -> dict[str, str]:
    """The variable that gives isotune's process the heap on which its scripts begin; nothing for another side."""
    tunables = malloc_tunables(os.environ) if side == "isotune" else None
    return {} if tunables is None else {VARIABLE: tunables}


class SideFailed(Exception):
    """A side that cannot run, and why."""


def data_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that say where the conversations and the tokenizer lie."""
    parser.add_argument("--conversations", type=Path, default=DATA / "guanaco" / "train.jsonl")
    parser.add_argument("--tokenizer", type=Path, default=DATA / "tokenizers" / "opt")


def require_data(parser: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    """End the program with status 2 where the data are not there."""
    for needed in (given.conversations, given.tokenizer):
        if not needed.exists():
            parser.error(f"{needed} is not there: set ISOTUNE_TEST_DATA or name another")
