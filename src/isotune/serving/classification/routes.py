"""The endpoints of a classifier, or of an ensemble of them."""

from dataclasses import asdict
from typing import Any

import anyio.to_thread
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from isotune.config.task_types import REGRESSION
from isotune.data.classification.pairs import joined
from isotune.serving.bodies import OneText, ToClassify, check_count
from isotune.serving.classification import attribution, similar
from isotune.serving.classification.service import TextService, ToExplain, ToPredict
from isotune.serving.http import Asked, post, results_of
from isotune.serving.worker import Worker


class ClassifierRoutes:
    """POST /predict, /attributions and /similar."""

    def __init__(self, model_id: str, worker: Worker, service: TextService, errors: similar.SimilarErrors):
        self.model_id, self.worker, self.service, self.errors = model_id, worker, service, errors

    def facts(self) -> dict[str, Any]:
        """What the page must know."""
        service = self.service
        return {
            "kind": "classifier",
            "task_type": service.says.task_type,
            "labels": [] if service.says.task_type == REGRESSION else service.says.names,
            "pair": service.is_pair,
            "max_seq_length": service.max_seq_length,
            "attribution": attribution.METHOD,
            "similar": similar.METHOD,
            "errors": len(self.errors.errors),
        }

    def counts(self) -> dict[str, int]:
        """What the model has done beside requests: nothing that is counted."""
        return {}

    def routes(self) -> list[Route]:
        """The endpoints."""
        limits = self.worker.limits
        return [
            post("/predict", ToClassify, limits, self._predict),
            post("/attributions", OneText, limits, self._attributions),
            post("/similar", OneText, limits, self._similar),
        ]

    async def _predict(self, asked: Asked) -> Response:
        texts, others = asked.body.columns()
        check_count(len(texts), self.worker.limits, "texts")
        documents = await anyio.to_thread.run_sync(self.service.prepare, texts, others)
        (outputs,) = await results_of(asked, self.worker, [ToPredict(documents)])
        predictions = self.service.as_json(documents, outputs)
        return JSONResponse(
            {"model": self.model_id, "task_type": self.service.says.task_type, "predictions": predictions}
        )

    async def _attributions(self, asked: Asked) -> Response:
        others = None if asked.body.text_pair is None else [asked.body.text_pair]
        documents = await anyio.to_thread.run_sync(self.service.prepare, [asked.body.text], others)
        work = ToExplain(documents, self.service.output_of(asked.body.label))
        ((output, found),) = await results_of(asked, self.worker, [work])
        says = self.service.says
        label = None if says.task_type == REGRESSION else says.names[output]
        return JSONResponse({"method": attribution.METHOD, "label": label, **asdict(found)})

    async def _similar(self, asked: Asked) -> Response:
        others = None if asked.body.text_pair is None else [asked.body.text_pair]
        (text,) = joined([asked.body.text], others)
        found = await anyio.to_thread.run_sync(self.errors.find, text)
        return JSONResponse({"method": similar.METHOD, "errors": found})
