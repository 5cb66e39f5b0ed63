"""Between a request and the model's queue: its body, the results that it waits for, its errors."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from isotune.serving.bodies import read_body
from isotune.serving.limits import BAD_REQUEST, BUSY, FAILED, TOO_LARGE, Limits, Refused, too_late
from isotune.serving.worker import Job, Worker

B = TypeVar("B")
T = TypeVar("T")
GRACE_SECONDS = 1.0  # the worker's own answer to a late job comes first


@dataclass(frozen=True)
class Asked:
    """A request with its body, which is done by `ends` of time.monotonic()."""

    request: Request
    body: Any
    ends: float


def post(path: str, kind: type[B], limits: Limits, answer: Callable[[Asked], Awaitable[Response]]) -> Route:
    """A route whose body is of a kind: `answer` gets it checked."""

    async def endpoint(request: Request) -> Response:
        ends = time.monotonic() + limits.seconds
        body = read_body(kind, await _read_json(request, limits))  # type: ignore[type-var]  (each kind is a body)
        return await answer(Asked(request, body, ends))

    return Route(path, endpoint, methods=["POST"])


async def _read_json(request: Request, limits: Limits) -> Any:
    parts, size = list[bytes](), 0
    try:
        async with asyncio.timeout(limits.seconds):
            async for part in request.stream():
                parts.append(part)
                size += len(part)
                if size > limits.body_bytes:
                    what = f"the body has more than {limits.body_bytes:,} bytes"
                    raise Refused(TOO_LARGE, "too_large", what)
    except TimeoutError:
        raise Refused(408, "timeout", "the body did not come in time") from None
    try:
        return json.loads(b"".join(parts))
    except (ValueError, RecursionError) as error:
        what = str(error) if isinstance(error, json.JSONDecodeError) else "it is nested too deep or not UTF-8"
        raise Refused(BAD_REQUEST, "not_json", f"the body is not JSON: {what}") from None


async def results_of(asked: Asked, worker: Worker, works: Sequence[Any]) -> list[Any]:
    """The results of a request's jobs; they are given up where the client goes away or the time is up."""
    jobs = worker.submit(works, asked.ends)
    try:
        return await in_time(asked, asyncio.gather(*(asyncio.wrap_future(job.result) for job in jobs)))
    finally:
        leave(jobs)


async def in_time(asked: Asked, awaited: Awaitable[T]) -> T:
    """What is awaited for a request; it is given up where the client goes away or the time is up."""
    found, gone = asyncio.ensure_future(awaited), asyncio.ensure_future(_disconnected(asked.request))
    try:
        left = asked.ends - time.monotonic() + GRACE_SECONDS
        await asyncio.wait({found, gone}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        if not found.done():
            raise ClientDisconnect if gone.done() else too_late()
        return found.result()
    finally:
        for task in (gone, found):
            task.cancel()
            with suppress(asyncio.CancelledError, Refused):
                await task


def leave(jobs: Sequence[Job]) -> None:
    """Say that nobody waits for jobs any more; done ones stay as they are."""
    for job in jobs:
        job.leave()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _refused(request: Request, error: Any) -> Response:
    # a refused body may not have been read to its end, so the connection cannot go on
    headers = {"connection": "close"} if error.status in (408, TOO_LARGE) else {}
    headers |= {"retry-after": "1"} if error.status == BUSY else {}
    return JSONResponse(error.as_json(), error.status, headers=headers)


async def _no_such(request: Request, error: Any) -> Response:
    known = {404: "there is no such page", 405: f"{request.method} is not what this page takes"}
    refused = Refused(error.status_code, "no_such_page", known.get(error.status_code, str(error.detail)))
    return JSONResponse(refused.as_json(), error.status_code, headers=error.headers)


async def _gone(request: Request, error: Any) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _failed(request: Request, error: Any) -> Response:
    return JSONResponse(Refused(FAILED, "failed", "the server failed").as_json(), FAILED)


HANDLERS: dict[Any, Any] = {
    Refused: _refused, HTTPException: _no_such, ClientDisconnect: _gone, Exception: _failed
}  # fmt: skip
