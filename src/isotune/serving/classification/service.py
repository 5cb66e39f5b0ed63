"""Classifiers behind the queue: the texts of all requests that wait are packed into one forward without padding.

No document attends to another, so a text's probabilities are those that it has alone, to the rounding of products.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from isotune.config.task_types import MULTI_LABEL, REGRESSION
from isotune.data.classification.predictions import predicted
from isotune.data.classification.thresholds import Thresholds
from isotune.data.documents import Documents
from isotune.evaluation.classification.evaluate import BATCH_TOKENS
from isotune.evaluation.classification.sentences import check_utf8
from isotune.evaluation.distributed_eval import Ranks
from isotune.evaluation.models import Classifier
from isotune.evaluation.prediction.predictors import TextPredictor
from isotune.io.errors import UserError
from isotune.serving.classification.attribution import Attribution, integrated_gradients
from isotune.serving.limits import BAD_REQUEST, Refused
from isotune.serving.worker import Job

OfModels = tuple[Documents, ...]  # the same texts as each of the served models reads them


@dataclass(frozen=True)
class ToPredict:
    """The texts of one request; the result is what is predicted of them, [texts, outputs] or [texts]."""

    documents: OfModels

    @property
    def tokens(self) -> int:
        """The tokens of the model that reads most; the models run one after the other."""
        return max(len(documents.input_ids) for documents in self.documents)


@dataclass(frozen=True)
class ToExplain:
    """One text; the result is the number of an output, and the share of each of the text's words in that."""

    documents: OfModels
    output: int | None  # None for the likeliest


@dataclass(frozen=True)
class Outputs:
    """What is predicted: classes, labels or a number."""

    task_type: str
    names: list[str]  # of the classes or labels
    thresholds: Thresholds  # from which a text has a label, of multi_label


class TextService(ABC):
    """What the worker does with texts to classify, and the forms in which requests and answers come."""

    def __init__(self, says: Outputs, *, is_pair: bool, max_seq_length: int, device_type: str) -> None:
        self.says, self.is_pair, self.max_seq_length = says, is_pair, max_seq_length
        self.batch_tokens = BATCH_TOKENS.get(device_type, BATCH_TOKENS["cuda"])

    @abstractmethod
    def documents(self, of_each: Sequence[Sequence[str]]) -> OfModels:
        """One column of texts, or the two of pairs, as the models read them."""

    @abstractmethod
    def outputs(self, documents: OfModels) -> np.ndarray:
        """Probabilities, float64 [texts, classes or labels], or the numbers [texts] of a regression."""

    @abstractmethod
    def explain(self, documents: OfModels, output: int) -> Attribution:
        """What the words of one text add to an output; Refused where that cannot be said."""

    def prepare(self, texts: Sequence[str], others: Sequence[str] | None) -> OfModels:
        """The texts of a request; Refused where pairs are read and these are texts, or the reverse."""
        if self.is_pair != (others is not None):
            wanted = 'two texts: send "pairs"' if self.is_pair else 'one text: send "text" or "texts"'
            raise Refused(BAD_REQUEST, "wrong_form", f"this model reads {wanted}", "pairs")
        try:
            columns = [texts] if others is None else [texts, others]
            check_utf8(columns)
            return self.documents(columns)
        except UserError as error:
            raise Refused(BAD_REQUEST, "not_a_text", str(error), "text") from error

    def group(self, waiting: Sequence[Job]) -> list[Job]:
        """The first job and the further predictions that fit into one forward; an explanation runs alone."""
        first = waiting[0]
        if isinstance(first.work, ToExplain):
            return [first]
        chosen, tokens = [first], first.work.tokens
        for job in waiting[1:]:
            if isinstance(job.work, ToPredict):
                tokens += job.work.tokens
                if tokens > self.batch_tokens:
                    break
                chosen.append(job)
        return chosen

    def run(self, jobs: list[Job]) -> None:
        """One forward for all predictions, or one explanation."""
        work = jobs[0].work
        if isinstance(work, ToExplain):
            output = work.output if work.output is not None else int(self.outputs(work.documents)[0].argmax())
            jobs[0].result.set_result((output, self.explain(work.documents, output)))
            return
        of_each_model = zip(*(job.work.documents for job in jobs), strict=True)
        outputs = self.outputs(tuple(Documents.concat(parts) for parts in of_each_model))
        bounds = np.cumsum([len(job.work.documents[0]) for job in jobs])[:-1]
        for job, own in zip(jobs, np.split(outputs, bounds), strict=True):
            job.result.set_result(own)

    def as_json(self, documents: OfModels, outputs: np.ndarray) -> list[dict[str, Any]]:
        """What is answered of each text, with how many of its tokens were read where it was too long.

        Of several models these are the tokens of the one that reads the smallest share of the text.
        """
        task_type, names = self.says.task_type, self.says.names
        found = predicted(task_type, outputs, self.says.thresholds)
        whole = np.stack([each.columns["whole_lengths"] for each in documents])  # [models, texts]
        read = np.stack([each.lengths for each in documents])
        least = (read / np.maximum(whole, 1)).argmin(axis=0)
        answers: list[dict[str, Any]] = []
        for row, output in enumerate(outputs):
            if task_type == REGRESSION:
                answer: dict[str, Any] = {"value": float(output)}
            elif task_type == MULTI_LABEL:
                answer = {"labels": [names[label] for label in np.flatnonzero(found[row])]}
            else:
                answer = {"label": names[int(found[row])]}
            if task_type != REGRESSION:
                answer["probabilities"] = dict(zip(names, map(float, output), strict=True))
            tokens, tokens_read = (int(lengths[least[row], row]) for lengths in (whole, read))
            answers.append(answer | {"tokens": tokens, "tokens_read": tokens_read})
        return answers

    def output_of(self, label: str | None) -> int | None:
        """The number of a label's output, or of a regression's; None without a label. Refused for an unknown one."""
        if self.says.task_type == REGRESSION:
            return 0
        if label is None:
            return None
        if label not in self.says.names:
            raise Refused(BAD_REQUEST, "no_such_label", f"this model has no label {label[:60]!r}", "label")
        return self.says.names.index(label)


class ClassifierService(TextService):
    """One classifier."""

    def __init__(self, classifier: Classifier) -> None:
        names = [str(name) for name in classifier.label_names or range(classifier.num_labels)]
        settings = classifier.settings
        super().__init__(
            Outputs(classifier.task_type, names, classifier.thresholds),
            is_pair=settings.dataset_text_pair_field is not None,
            max_seq_length=settings.max_seq_length,
            device_type=classifier.device.type,
        )
        self.predictor, self._ranks = TextPredictor(classifier), Ranks(0, 1, classifier.device)

    def documents(self, of_each: Sequence[Sequence[str]]) -> OfModels:
        """The texts as it reads them."""
        return (self.predictor.reader.documents(of_each),)

    def outputs(self, documents: OfModels) -> np.ndarray:
        """Its probabilities or numbers."""
        return self.predictor.outputs(documents[0], self._ranks)

    def explain(self, documents: OfModels, output: int) -> Attribution:
        """By integrated gradients."""
        return integrated_gradients(self.predictor.classifier, documents[0], output)
