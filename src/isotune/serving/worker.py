"""The one thread that runs the model, and the bounded queue before it: requests that wait together run together.

While a forward runs, requests gather; the next forward takes as many of them as belong together. So nobody waits for a
batch to fill, and a lone request is not delayed.
"""

import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from isotune.serving.limits import BAD_REQUEST, BUSY, FAILED, Limits, Refused, too_late


@dataclass(eq=False)
class Job:
    """What a request wants of the model."""

    work: Any
    ends: float  # of time.monotonic(), when its time is up
    on_piece: Callable[[str], None] | None = None  # takes text as it is generated, in the worker's thread
    result: "Future[Any]" = field(default_factory=Future)
    left: threading.Event = field(default_factory=threading.Event)  # set when nobody waits for it any more

    @property
    def is_wanted(self) -> bool:
        """Whether somebody waits for it and its time is not up."""
        return not self.left.is_set() and time.monotonic() < self.ends

    def leave(self) -> None:
        """Say that nobody waits for the result any more."""
        self.left.set()
        self.result.cancel()


class Service(Protocol):
    """What a kind of model does with requests."""

    def group(self, waiting: Sequence[Job]) -> list[Job]:
        """Those of the waiting jobs that run together next; the first is among them."""
        ...

    def run(self, jobs: list[Job]) -> None:
        """Set the result of each job; what it raises is the result of those that have none yet."""
        ...


class Worker:
    """Runs jobs in the order in which they came, those that belong together at once."""

    def __init__(self, service: Service, limits: Limits) -> None:
        self.service, self.limits = service, limits
        self.running = 0  # jobs of the batch that runs
        self.jobs_done = self.batches = 0  # so far
        self._waiting: list[Job] = []
        self._changed = threading.Condition()
        self._closing = False
        # a daemon: a second Ctrl-C ends the process in the middle of a forward
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)

    def start(self) -> None:
        """Begin to run jobs."""
        self._thread.start()

    def close(self) -> None:
        """Take no more jobs, and return when those that wait are done."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def waiting(self) -> int:
        """The number of jobs in the queue."""
        return len(self._waiting)

    def submit(
        self, works: Sequence[Any], ends: float, on_piece: Callable[[int, str], None] | None = None
    ) -> list[Job]:
        """The jobs of one request, all in the queue or none; Refused where it is full, or shorter than the request.

        `on_piece` takes the number of a job among these, and text as it is generated, in the worker's thread.
        """
        tellers = [None if on_piece is None else partial(on_piece, number) for number in range(len(works))]
        jobs = [Job(work, ends, tell) for work, tell in zip(works, tellers, strict=True)]
        if len(jobs) > self.limits.waiting:  # later too
            what = f"the request is {len(jobs)} of the model at once, and at most {self.limits.waiting} may wait"
            raise Refused(BAD_REQUEST, "too_many", f"{what}: send fewer, or serve with a larger --queue")
        with self._changed:
            if self._closing:
                raise Refused(BUSY, "stopping", "the server is stopping")
            if len(self._waiting) + len(jobs) > self.limits.waiting:
                raise Refused(BUSY, "busy", f"{len(self._waiting)} requests wait already: try again in a moment")
            self._waiting += jobs
            self._changed.notify()
        return jobs

    def _work(self) -> None:
        while (jobs := self._next()) is not None:
            jobs = [job for job in jobs if job.result.set_running_or_notify_cancel()]
            if jobs:
                self.running = len(jobs)
                self._run(jobs)
                self.batches += 1
                self.jobs_done += len(jobs)
                self.running = 0  # last: who reads this reads the counts of the batch

    def _next(self) -> list[Job] | None:
        """The jobs to run now; None when the worker is closed and the queue is empty."""
        while (waiting := self._wait()) is not None:
            fault = None
            try:  # without the lock, which requests need: to choose may ask the model
                jobs = self.service.group(waiting)
            except Exception as error:
                jobs, fault = [waiting[0]], error
            with self._changed:
                self._waiting = [job for job in self._waiting if job not in jobs]
            if fault is None:
                return jobs
            if jobs[0].result.set_running_or_notify_cancel():
                jobs[0].result.set_exception(fault)
        return None

    def _wait(self) -> tuple[Job, ...] | None:
        """Those that wait, once there is one, without those that nobody wants any more; None as `_next`."""
        with self._changed:
            while True:
                for job in [job for job in self._waiting if not job.is_wanted]:
                    self._waiting.remove(job)
                    if job.result.set_running_or_notify_cancel():
                        job.result.set_exception(too_late())
                if self._waiting:
                    return tuple(self._waiting)
                if self._closing:
                    return None
                self._changed.wait()

    def _run(self, jobs: list[Job]) -> None:
        try:
            self.service.run(jobs)
        except Refused as refused:
            _fail(jobs, refused)
        except Exception as error:
            if len(jobs) > 1:  # whichever job it is, the others are answered
                for job in jobs:
                    if not job.result.done():
                        self._run([job])
                return
            # no line of the server quotes what somebody asked, and no answer says where its files are
            print(f"error: a request failed: {type(error).__name__}", file=sys.stderr, flush=True)
            _fail(jobs, Refused(FAILED, "failed", f"the model failed ({type(error).__name__})"))


def _fail(jobs: Sequence[Job], why: Refused) -> None:
    for job in jobs:
        if not job.result.done():
            job.result.set_exception(why)
