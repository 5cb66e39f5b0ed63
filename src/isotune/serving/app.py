"""The application: the page, what it needs to know, and the endpoints of a run's kind."""

import contextlib
from collections.abc import AsyncIterator, Collection
from pathlib import Path
from string import Template
from typing import Any, Protocol

import anyio.to_thread
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from isotune import __version__
from isotune.serving.guard import Guard
from isotune.serving.http import HANDLERS
from isotune.serving.worker import Worker

PAGE = Path(__file__).parent / "page"


class Routes(Protocol):
    """The endpoints of a kind of model."""

    model_id: str
    worker: Worker

    def facts(self) -> dict[str, Any]:
        """What the page must know; `kind` names its main part and its script."""
        ...

    def counts(self) -> dict[str, int]:
        """What the model has done so far, beside the number of requests."""
        ...

    def routes(self) -> list[Route]:
        """The endpoints."""
        ...


def make_app(routes: Routes, replayed: str | None, names: Collection[str]) -> Starlette:
    """The application; `replayed` says what was replayed, `names` are those of this server in a request's Host."""
    worker, facts = routes.worker, routes.facts()
    limits = worker.limits

    main = (PAGE / f"{facts['kind']}.html").read_text("utf-8")
    whole = Template((PAGE / "frame.html").read_text("utf-8")).substitute(kind=facts["kind"], main=main)

    async def page(request: Request) -> Response:
        return HTMLResponse(whole)

    async def info(request: Request) -> Response:
        most = {"texts": limits.texts, "new_tokens": limits.new_tokens, "body_bytes": limits.body_bytes}
        most |= {"waiting": limits.waiting, "seconds": limits.seconds}
        return JSONResponse({"model": routes.model_id, **facts, "replayed": replayed, "limits": most})

    async def health(request: Request) -> Response:
        counts = {"waiting": worker.waiting, "running": worker.running}
        counts |= {"done": worker.jobs_done, "batches": worker.batches, **routes.counts()}
        return JSONResponse({"status": "ok", "version": __version__, "model": routes.model_id, "requests": counts})

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        worker.start()
        try:
            yield
        finally:
            await anyio.to_thread.run_sync(worker.close)

    own = [Route("/", page), Route("/info", info), Route("/health", health)]
    return Starlette(
        routes=[*own, *routes.routes(), Mount("/static", StaticFiles(directory=PAGE))],
        middleware=[Middleware(Guard, names=names)],
        exception_handlers=HANDLERS,
        lifespan=lifespan,
    )
