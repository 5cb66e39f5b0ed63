"""What a model needs of a row and says of it: classes and probabilities, numbers, or answers.

A predictor is the same for every source of rows. What it says of a row does not depend on the rows beside it, but for
the rounding of matrix products.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np

from isotune.config.task_types import MULTI_LABEL, REGRESSION
from isotune.data.classification.predictions import prediction_lines
from isotune.data.classification.thresholds import THRESHOLD, Thresholds
from isotune.data.documents import Documents
from isotune.data.sft.forms import TEXT_FIELD, NamedColumns
from isotune.data.sft.questions import question_column, question_of
from isotune.data.sources.source import Row, Source, is_null, kind_of_value, surrogate_fault
from isotune.evaluation.classification.evaluate import classify, outputs_of
from isotune.evaluation.classification.sentences import TextReader
from isotune.evaluation.distributed_eval import Ranks
from isotune.evaluation.generation.completion import Decoding, Prompt, complete
from isotune.evaluation.models import Classifier, GenerationModel
from isotune.io.errors import UserError
from isotune.models.layouts.fitting import FittingBatches

Line = dict[str, Any]
LEFT_OUT = "left_out"  # the key of a line that says why its row has no prediction


@dataclass(frozen=True)
class LeftOut:
    """Why a row cannot be predicted."""

    reason: str


@dataclass(frozen=True)
class Part:
    """The lines of some rows, in their order, and what was done to rows by how many."""

    lines: list[Line]
    counts: Counter[str] = field(default_factory=Counter[str])


class Predictor(Protocol):
    """A model with the way from a row to it."""

    @property
    def part_rows(self) -> int:
        """Rows that are predicted together."""
        ...

    @property
    def facts(self) -> Mapping[str, Any]:
        """What decides the predictions beside the rows and the model's weights, as JSON can hold it."""
        ...

    def take(self, row: Row, source: Source, number: int) -> Any | LeftOut:
        """What the model needs of a row; UserError for a row that is broken."""
        ...

    def prepare(self, rows: Sequence[tuple[int, Any]]) -> Any:
        """What was taken of some rows, each with its number, ready for the model; it may run in a thread."""
        ...

    def predict(self, prepared: Any, ranks: Ranks) -> Part:
        """A line for each of these rows, the same on every process."""
        ...

    def flat(self, line: Line) -> Line:
        """A line as the cells of a table, without its id."""
        ...


# rows of a part: as many as a minute on a CPU predicts, and enough to fill several forwards of several GPUs
TEXT_ROWS, ANSWER_ROWS = {"cpu": 512, "cuda": 16_384}, {"cpu": 64, "cuda": 2_048}


class TextPredictor:
    """A classifier of texts or of pairs, whose columns its settings name."""

    def __init__(self, classifier: Classifier, *, batch_tokens: int | None = None, batch_size: int | None = None):
        self.classifier, self.settings = classifier, classifier.settings
        self.batch_tokens, self.batch_size, self.fitting = batch_tokens, batch_size, FittingBatches()
        self.reader = TextReader(classifier)
        columns = {key: getattr(self.settings, key) for key in ("dataset_text_field", "dataset_text_pair_field")}
        self.columns = {key: column for key, column in columns.items() if column is not None}
        if len(self.columns) > 1:
            self.reader.encoder.pair_form()  # refused before the work where the tokenizer has none

    @property
    def part_rows(self) -> int:
        """As its device predicts in about a minute."""
        return TEXT_ROWS.get(self.classifier.device.type, TEXT_ROWS["cuda"])

    @property
    def facts(self) -> dict[str, Any]:
        """The task, the names of the classes and how texts are read."""
        settings, names = self.settings, self.classifier.label_names
        return {
            "task_type": self.classifier.task_type,
            "label_names": list(names) if names else None,
            "columns": self.columns,
            "max_seq_length": settings.max_seq_length,
            "overlong": settings.overlong,
            "clean_text": settings.clean_text,
            "dtype": str(next(self.classifier.model.parameters()).dtype).removeprefix("torch."),
        }

    def take(self, row: Row, source: Source, number: int) -> tuple[str, ...] | LeftOut:
        """The text of a row, or both; a row with a null is left out."""
        texts: list[str] = []
        for key, column in self.columns.items():
            if column not in row:
                raise source.lacks(number, row, column, key)
            text, where = row[column], f"{source.where(number)}, column {column!r},"
            if is_null(text):
                return LeftOut(f"a null in the column {column!r}")
            if not isinstance(text, str):
                raise UserError(f"{where} holds {kind_of_value(text)}, not a text")
            if fault := surrogate_fault(text):
                raise UserError(f"{where} {fault}")
            texts.append(text)
        return tuple(texts)

    def prepare(self, rows: Sequence[tuple[int, tuple[str, ...]]]) -> Documents:
        """The documents of texts."""
        return self.reader.documents(list(zip(*(texts for _, texts in rows), strict=True)))

    def predict(self, prepared: Documents, ranks: Ranks) -> Part:
        """Classes and probabilities, labels with theirs, or numbers."""
        task_type, names = self.classifier.task_type, self.classifier.label_names
        lines = lines_of_outputs(task_type, self.outputs(prepared, ranks), names, self.classifier.thresholds)
        return Part(lines, self.cut(prepared))

    def outputs(self, prepared: Documents, ranks: Ranks) -> np.ndarray:
        """Probabilities, float64 [documents, classes or labels], or numbers [documents]; the same on every process."""
        sizes: dict[str, Any] = {"batch_tokens": self.batch_tokens, "batch_size": self.batch_size}
        logits = classify(self.classifier, prepared, ranks, **sizes, fitting=self.fitting)
        return outputs_of(self.classifier.task_type, logits)

    def flat(self, line: Line) -> Line:
        """A column for the prediction, for its name, and for the probability of each class."""
        return flat_prediction(line, self.classifier.task_type, self.classifier.label_names)

    def cut(self, documents: Documents) -> Counter[str]:
        """How many of the documents were too long, by what was done to them."""
        longest = self.settings.max_seq_length
        count = int((documents.columns["whole_lengths"] > longest).sum())
        return Counter({f"cut to {longest:,} tokens ({self.settings.overlong})": count} if count else {})


def lines_of_outputs(
    task_type: str, outputs: np.ndarray, names: Sequence[str] | None, thresholds: Thresholds = THRESHOLD
) -> list[Line]:
    """The lines of what a classifier says, as those of an evaluation, but without labels and ids."""
    lines = prediction_lines(task_type, range(len(outputs)), None, outputs, names, thresholds)
    return [{key: value for key, value in line.items() if key != "id"} for line in lines]


def flat_prediction(line: Line, task_type: str, names: Sequence[str] | None) -> Line:
    """The cells of one line: `prediction`, `prediction_name` and `probability[CLASS]`; lists of labels as JSON."""
    if task_type == REGRESSION:
        return {"prediction": line["prediction"]}
    probabilities = line["probabilities"]
    called = names or range(len(probabilities))
    key = "prediction_names" if task_type == MULTI_LABEL else "prediction_name"
    cells = {"prediction": line["prediction"], **({key: line[key]} if key in line else {})}
    return cells | {f"probability[{name}]": one for name, one in zip(called, probabilities, strict=True)}


class AnswerPredictor:
    """A language model that answers questions, each as if it were asked alone.

    A row is read by the first of `columns` that it has.
    """

    def __init__(
        self, lm: GenerationModel, columns: Sequence[NamedColumns], decoding: Decoding, batch_size: int
    ) -> None:
        self.lm, self.columns, self.decoding, self.batch_size = lm, columns, decoding, batch_size
        self.fitting = FittingBatches(halves=not lm.is_sharded)

    @property
    def part_rows(self) -> int:
        """As its device answers in about a minute."""
        return ANSWER_ROWS.get(self.lm.device.type, ANSWER_ROWS["cuda"])

    @property
    def facts(self) -> dict[str, Any]:
        """How answers are chosen, and the columns of questions that were named."""
        named = [{"dataset_prompt_field": one.prompt, "dataset_text_field": one.text} for one in self.columns]
        return {"decoding": asdict(self.decoding), "columns": named}

    def take(self, row: Row, source: Source, number: int) -> str | LeftOut:
        """The prompt of what a row asks; one without a question, or with a longer one than the model reads, is left."""
        found = ((own, named) for named in self.columns if (own := question_column(row, named)))
        column, named = next(found, (None, self.columns[-1]))
        if column is None:
            key = "dataset_prompt_field" if named.prompt or named.text == TEXT_FIELD else "dataset_text_field"
            raise source.lacks(number, row, named.prompt or named.text, key)
        try:
            question = question_of(row, column, is_named=named != NamedColumns())
            if isinstance(question, str):
                return LeftOut(question)
            prompt = self.lm.encoder.prompt(*question)
        except ValueError as error:
            raise UserError(f"{source.where(number)} cannot be asked: {error}") from error
        if fault := surrogate_fault(prompt):
            raise UserError(f"{source.where(number)}, column {column!r}, {fault}")
        if self.lm.token_count(prompt) >= self.lm.positions:
            return LeftOut(f"longer than the model's {self.lm.positions:,} positions")
        return prompt

    def prepare(self, rows: Sequence[tuple[int, str]]) -> list[Prompt]:
        """The prompts; the number of a row seeds what is drawn for it."""
        return [Prompt(number, prompt) for number, prompt in rows]

    def predict(self, prepared: Sequence[Prompt], ranks: Ranks) -> Part:
        """Each answer, its number of tokens, and whether the model ended it."""
        done = complete(self.lm, prepared, self.decoding, batch_size=self.batch_size, ranks=ranks, fitting=self.fitting)
        lines = []
        for prompt in prepared:
            one = done[prompt.row]
            text = self.lm.encoder.answer_in(one.text, prompt.text)
            lines.append({"text": text, "tokens": len(one.tokens), "ended": one.ended})
        cut = sum(not line["ended"] for line in lines)
        limit = self.decoding.max_new_tokens
        return Part(lines, Counter({f"not ended by the model within {limit:,} tokens": cut} if cut else {}))

    def flat(self, line: Line) -> Line:
        """The line as it is."""
        return line
