"""The queue before the model: requests that wait run together, a full queue refuses, a stop answers what waits."""

import threading
import time

import pytest

from isotune.serving.limits import Limits, Refused
from isotune.serving.worker import Worker

SOON = 30.0


class Doubling:
    """A service that doubles numbers, waits while its gate is closed, and cannot do 13."""

    def __init__(self) -> None:
        self.gate, self.batches = threading.Event(), list[list[int]]()
        self.gate.set()

    def group(self, waiting):
        if waiting[0].work == 17:
            raise ValueError("17 belongs nowhere")
        return [job for job in waiting if job.work % 2 == waiting[0].work % 2][:4]

    def run(self, jobs):
        assert self.gate.wait(SOON)
        self.batches.append([job.work for job in jobs])
        if any(job.work == 13 for job in jobs):
            raise ValueError("13 is not doubled")
        for job in jobs:
            job.result.set_result(2 * job.work)


@pytest.fixture
def doubling():
    service = Doubling()
    worker = Worker(service, Limits(waiting=8))
    worker.start()
    yield service, worker
    service.gate.set()
    worker.close()


def later():
    return time.monotonic() + SOON


def hold(service, worker, work=2):
    """Let the worker begin one job and stop in it."""
    service.gate.clear()
    (job,) = worker.submit([work], later())
    ends = later()
    while worker.waiting and time.monotonic() < ends:
        time.sleep(0.001)
    return job


def test_what_waits_together_and_belongs_together_runs_together_in_order(doubling):
    service, worker = doubling
    held = hold(service, worker)
    jobs = [worker.submit([work], later())[0] for work in (3, 4, 5, 7, 9, 11)]
    service.gate.set()
    assert [job.result.result(SOON) for job in (held, *jobs)] == [4, 6, 8, 10, 14, 18, 22]
    assert service.batches == [[2], [3, 5, 7, 9], [4], [11]]


def test_a_full_queue_refuses_a_request_whole_and_takes_it_later(doubling):
    service, worker = doubling
    held = hold(service, worker)
    jobs = worker.submit([1, 1, 1, 1, 1, 1], later())
    with pytest.raises(Refused, match="6 requests wait already") as refused:
        worker.submit([5, 5, 5], later())
    assert refused.value.status == 503 and worker.waiting == 6
    service.gate.set()
    assert [job.result.result(SOON) for job in (held, *jobs)] == [4] + [2] * 6
    assert worker.submit([5, 5, 5], later())[0].result.result(SOON) == 10


def test_a_request_that_the_queue_never_has_room_for_is_a_mistake_of_its_own(doubling):
    _, worker = doubling
    with pytest.raises(Refused, match="at most 8 may wait: send fewer, or serve with a larger --queue") as refused:
        worker.submit([1] * 9, later())
    assert refused.value.status == 400 and worker.waiting == 0


def test_one_that_fails_does_not_fail_the_others_of_its_batch(doubling, capsys):
    service, worker = doubling
    held = hold(service, worker)
    jobs = worker.submit([3, 13, 5], later())
    service.gate.set()
    assert (held.result.result(SOON), jobs[0].result.result(SOON), jobs[2].result.result(SOON)) == (4, 6, 10)
    with pytest.raises(Refused, match="the model failed") as refused:
        jobs[1].result.result(SOON)
    assert refused.value.status == 500 and str(refused.value) == "the model failed (ValueError)"
    assert capsys.readouterr().err == "error: a request failed: ValueError\n"


def test_one_that_belongs_nowhere_fails_alone_and_the_worker_goes_on(doubling):
    service, worker = doubling
    service.gate.set()
    (lost,) = worker.submit([17], later())
    (other,) = worker.submit([3], later())
    with pytest.raises(ValueError, match="17 belongs nowhere"):
        lost.result.result(SOON)
    assert other.result.result(SOON) == 6


def test_one_whose_time_is_up_or_whose_client_left_does_not_run(doubling):
    service, worker = doubling
    held = hold(service, worker)
    (late,), (left,), (kept,) = (
        worker.submit([3], time.monotonic()),
        worker.submit([5], later()),
        worker.submit([7], later()),
    )
    left.leave()
    service.gate.set()
    assert (held.result.result(SOON), kept.result.result(SOON)) == (4, 14)
    with pytest.raises(Refused, match="not done in the time") as refused:
        late.result.result(SOON)
    assert refused.value.status == 503 and left.result.cancelled()
    assert service.batches == [[2], [7]]


def test_closing_answers_what_waits_and_takes_no_more(doubling):
    service, worker = doubling
    held = hold(service, worker)
    jobs = worker.submit([3, 4, 5], later())
    closing = threading.Thread(target=worker.close)
    closing.start()
    service.gate.set()
    closing.join(SOON)
    assert [job.result.result(0) for job in (held, *jobs)] == [4, 6, 8, 10]
    with pytest.raises(Refused, match="stopping"):
        worker.submit([1], later())
