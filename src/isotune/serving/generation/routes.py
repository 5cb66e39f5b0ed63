"""The endpoints of a language model, in the form of OpenAI's API: its client packages work with them unchanged."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from typing import Any

import anyio.to_thread
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from isotune.evaluation.generation.completion import Decoding
from isotune.evaluation.tasks import DEFAULT_MAX_NEW_TOKENS
from isotune.serving.bodies import Chat, Completion, Generation, check_count
from isotune.serving.generation.openai_form import DONE, Form, failure
from isotune.serving.generation.service import Answer, GeneratorService, ToAnswer
from isotune.serving.http import Asked, in_time, leave, post, results_of
from isotune.serving.limits import BAD_REQUEST, FAILED, Refused
from isotune.serving.worker import Job, Worker

# of one choice: its number, and a piece of its text or its result
Told = tuple[int, str | Answer | BaseException]


class GeneratorRoutes:
    """POST /v1/chat/completions and /v1/completions, GET /v1/models."""

    def __init__(self, model_id: str, worker: Worker, service: GeneratorService, created: int) -> None:
        self.model_id, self.worker, self.service, self.created = model_id, worker, service, created

    def facts(self) -> dict[str, Any]:
        """What the page must know."""
        form = "Guanaco's form" if self.service.lm.encoder.template is None else "the run's chat template"
        return {"kind": "generator", "form": form, "positions": self.service.lm.positions}

    def counts(self) -> dict[str, int]:
        """What the model has done so far."""
        return {"tokens": self.service.tokens, "alone": self.service.alone}

    def routes(self) -> list[Route]:
        """The endpoints."""
        limits = self.worker.limits
        return [
            post("/v1/chat/completions", Chat, limits, self._chat),
            post("/v1/completions", Completion, limits, self._completion),
            Route("/v1/models", self._models),
            Route("/v1/models/{name}", self._model),
        ]

    def _card(self) -> dict[str, Any]:
        return {"id": self.model_id, "object": "model", "created": self.created, "owned_by": "isotune"}

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def _model(self, request: Request) -> Response:
        self._check_model(request.path_params["name"])
        return JSONResponse(self._card())

    def _check_model(self, name: str | None) -> None:
        if name not in (None, self.model_id):
            raise Refused(404, "model_not_found", f"this server has the model {self.model_id!r} alone", "model")

    async def _chat(self, asked: Asked) -> Response:
        body: Chat = asked.body
        longest = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
        decoding = self._decoding(body, longest)
        prepare = self.service.prepare_chat
        work = await anyio.to_thread.run_sync(prepare, body.messages, decoding, body.stop_words)
        return await self._answer(asked, Form(self.model_id, is_chat=True), [work])

    async def _completion(self, asked: Asked) -> Response:
        body: Completion = asked.body
        check_count(len(body.prompt), self.worker.limits, "prompt")
        decoding = self._decoding(body, body.max_tokens)

        def prepare() -> list[ToAnswer]:
            return [
                self.service.prepare_prompt(prompt, "prompt", decoding, body.stop_words, is_chat=False)
                for prompt in body.prompt
            ]

        works = await anyio.to_thread.run_sync(prepare)
        return await self._answer(asked, Form(self.model_id, is_chat=False), works)

    def _decoding(self, body: Generation, longest: int | None) -> Decoding:
        self._check_model(body.model)
        most = self.worker.limits.new_tokens
        longest = min(DEFAULT_MAX_NEW_TOKENS, most) if longest is None else longest
        if longest > most:
            raise Refused(BAD_REQUEST, "too_long", f"max_tokens is {longest}: at most {most} here", "max_tokens")
        if body.temperature == 0 and body.top_p < 1:
            what = "top_p has no effect on greedy answers: give a temperature above 0 too"
            raise Refused(BAD_REQUEST, "no_effect", what, "top_p")
        seed = body.seed if body.seed is not None else secrets.randbelow(2**31) if body.temperature > 0 else 0
        return Decoding(longest, body.temperature, body.top_p, seed)

    async def _answer(self, asked: Asked, form: Form, works: list[ToAnswer]) -> Response:
        if not asked.body.stream:
            return JSONResponse(form.whole(await results_of(asked, self.worker, works)))
        told: asyncio.Queue[Told] = asyncio.Queue()
        jobs = self._submit(asked, works, told)
        try:
            first = await in_time(asked, told.get())
            if isinstance(first[1], BaseException):  # before the first word: an error like any other
                raise first[1]
        except BaseException:
            leave(jobs)
            raise
        return _Stream(jobs, _events(form, len(jobs), told, first, wants_usage=asked.body.wants_usage))

    def _submit(self, asked: Asked, works: Sequence[ToAnswer], told: "asyncio.Queue[Told]") -> list[Job]:
        """Jobs whose pieces and results go to the queue `told`."""
        loop = asyncio.get_running_loop()

        def tell(number: int, what: str | Answer | BaseException) -> None:
            loop.call_soon_threadsafe(told.put_nowait, (number, what))

        def tell_result(number: int, result: "Future[Any]") -> None:
            if not result.cancelled():
                tell(number, result.exception() or result.result())

        jobs = self.worker.submit(works, asked.ends, tell)
        for number, job in enumerate(jobs):
            job.result.add_done_callback(lambda result, number=number: tell_result(number, result))
        return jobs


class _Stream(StreamingResponse):
    """Events about jobs, which nobody waits for once the stream ends, or before its first event was sent."""

    def __init__(self, jobs: Sequence[Job], events: AsyncIterator[str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"x-accel-buffering": "no"})
        self.jobs = jobs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            leave(self.jobs)


async def _events(
    form: Form, count: int, told: "asyncio.Queue[Told]", first: Told, *, wants_usage: bool
) -> AsyncIterator[str]:
    """The stream of `count` answers; an error ends it with an event that says so."""
    answers: dict[int, Answer] = {}
    number, what = first
    if form.is_chat:
        yield form.begin()
    while True:
        if isinstance(what, str):
            yield form.piece(number, what)
        elif isinstance(what, Answer):
            answers[number] = what
            yield form.end(number, what)
        else:
            yield failure(what if isinstance(what, Refused) else Refused(FAILED, "failed", "the model failed"))
            return
        if len(answers) == count:
            break
        number, what = await told.get()
    if wants_usage:
        yield form.usage([answers[number] for number in sorted(answers)])
    yield DONE
