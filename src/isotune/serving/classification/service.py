"""A classifier behind the queue: the texts of all requests that wait are packed into one forward without padding.

No document attends to another, so a text's probabilities are those that it has alone, to the rounding of products.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from isotune.config.task_types import MULTI_LABEL, REGRESSION
from isotune.data.classification.predictions import predicted
from isotune.data.documents import Documents
from isotune.evaluation.classification.evaluate import BATCH_TOKENS, classify, outputs_of
from isotune.evaluation.classification.sentences import TextReader, check_utf8
from isotune.evaluation.distributed_eval import Ranks
from isotune.evaluation.models import Classifier
from isotune.io.errors import UserError
from isotune.models.layouts.fitting import FittingBatches
from isotune.serving.classification.attribution import integrated_gradients
from isotune.serving.limits import BAD_REQUEST, Refused
from isotune.serving.worker import Job


@dataclass(frozen=True)
class ToPredict:
    """The documents of one request; the result is what the model predicts, [documents, outputs] or [documents]."""

    documents: Documents


@dataclass(frozen=True)
class ToExplain:
    """One document; the result is the number of an output, and the share of each of its words in that."""

    documents: Documents
    output: int | None  # None for the likeliest


class ClassifierService:
    """What the worker does with texts to classify, and the forms in which requests and answers come."""

    def __init__(self, classifier: Classifier) -> None:
        self.classifier = classifier
        self.reader = TextReader(classifier)
        self.names = [str(name) for name in classifier.label_names or range(classifier.num_labels)]
        self.is_pair = classifier.settings.dataset_text_pair_field is not None
        device = classifier.device
        self.batch_tokens = BATCH_TOKENS.get(device.type, BATCH_TOKENS["cuda"])
        self._ranks, self._fitting = Ranks(0, 1, device), FittingBatches()

    def prepare(self, texts: Sequence[str], others: Sequence[str] | None) -> Documents:
        """The documents of a request; Refused where this model reads pairs and these are texts, or the reverse."""
        if self.is_pair != (others is not None):
            wanted = 'two texts: send "pairs"' if self.is_pair else 'one text: send "text" or "texts"'
            raise Refused(BAD_REQUEST, "wrong_form", f"this model reads {wanted}", "pairs")
        try:
            columns = [texts] if others is None else [texts, others]
            check_utf8(columns)
            return self.reader.documents(columns)
        except UserError as error:
            raise Refused(BAD_REQUEST, "not_a_text", str(error), "text") from error

    def group(self, waiting: Sequence[Job]) -> list[Job]:
        """The first job and the further predictions that fit into one forward; an explanation runs alone."""
        first = waiting[0]
        if isinstance(first.work, ToExplain):
            return [first]
        chosen, tokens = [first], len(first.work.documents.input_ids)
        for job in waiting[1:]:
            if isinstance(job.work, ToPredict):
                tokens += len(job.work.documents.input_ids)
                if tokens > self.batch_tokens:
                    break
                chosen.append(job)
        return chosen

    def run(self, jobs: list[Job]) -> None:
        """One forward for all predictions, or one explanation."""
        work = jobs[0].work
        if isinstance(work, ToExplain):
            output = work.output if work.output is not None else int(self.outputs(work.documents)[0].argmax())
            jobs[0].result.set_result((output, integrated_gradients(self.classifier, work.documents, output)))
            return
        documents = Documents.concat([job.work.documents for job in jobs])
        outputs = self.outputs(documents)
        bounds = np.cumsum([len(job.work.documents) for job in jobs])[:-1]
        for job, own in zip(jobs, np.split(outputs, bounds), strict=True):
            job.result.set_result(own)

    def outputs(self, documents: Documents) -> np.ndarray:
        """Probabilities, float64 [documents, classes or labels], or the numbers [documents] of a regression."""
        return outputs_of(
            self.classifier.task_type, classify(self.classifier, documents, self._ranks, fitting=self._fitting)
        )

    def as_json(self, documents: Documents, outputs: np.ndarray) -> list[dict[str, Any]]:
        """What is answered for each document, with how many of its tokens were read where it was too long."""
        task_type = self.classifier.task_type
        found = predicted(task_type, outputs, self.classifier.thresholds)
        whole, read = documents.columns["whole_lengths"].tolist(), documents.lengths.tolist()
        answers: list[dict[str, Any]] = []
        for row, output in enumerate(outputs):
            if task_type == REGRESSION:
                answer: dict[str, Any] = {"value": float(output)}
            elif task_type == MULTI_LABEL:
                answer = {"labels": [self.names[label] for label in np.flatnonzero(found[row])]}
            else:
                answer = {"label": self.names[int(found[row])]}
            if task_type != REGRESSION:
                answer["probabilities"] = dict(zip(self.names, map(float, output), strict=True))
            answers.append(answer | {"tokens": whole[row], "tokens_read": read[row]})
        return answers

    def output_of(self, label: str | None) -> int | None:
        """The number of a label's output, or of a regression's; None without a label. Refused for an unknown one."""
        if self.classifier.task_type == REGRESSION:
            return 0
        if label is None:
            return None
        if label not in self.names:
            raise Refused(BAD_REQUEST, "no_such_label", f"this model has no label {label[:60]!r}", "label")
        return self.names.index(label)
