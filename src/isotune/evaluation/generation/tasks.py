"""What a model is asked, as a small YAML file, so that a data set is added without a line of code.

    dataset_name: builtin:pirate                                  a Hub id, folder, file or builtin:NAME, as in a recipe
    dataset_split: test
    prompt_template: "What is the capital of {country}?"          the question, from the row's columns, and
    reference_template: "{capital}"                               the answer to it; conversations need neither
    max_new_tokens: 32                                            longest answer
    metrics: [exact_match, chrf]                                  all where left out

A command line's flags win over the file.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any

from isotune.data.sources.source import Source, read_rows
from isotune.evaluation.classification.tasks import read_task_file, template_columns
from isotune.evaluation.generation.eval_samples import EvalSample, read_questions
from isotune.io.errors import UserError
from isotune.io.near_names import did_you_mean

METRICS = (
    "exact_match", "rouge1", "rouge2", "rougeL", "bleu", "chrf", "distinct_1", "distinct_2", "repetition",
    "length_ratio", "ended", "empty", "nll", "perplexity", "bits_per_byte",
)  # fmt: skip
DEFAULT_MAX_NEW_TOKENS = 256
_KINDS: dict[str, tuple[type, str]] = {"metrics": (list, "a list"), "max_new_tokens": (int, "a whole number")}


@dataclass(frozen=True, kw_only=True)
class GenerationTask:
    """Rows to ask and what to measure; the head of this module says what each field means."""

    dataset_name: str
    dataset_split: str = "test"
    prompt_template: str | None = None
    reference_template: str | None = None
    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS
    metrics: tuple[str, ...] = METRICS

    @property
    def name(self) -> str:
        """A name for the folder of the result: the data set's own."""
        return Path(self.dataset_name.replace("builtin:", "").rstrip("/")).stem

    def questions(self, limit: int | None = None) -> list[EvalSample]:
        """The questions with their answers, the first `limit` of them.

        Raises:
            UserError: no such data, a column that a row lacks, or an empty question or answer.
        """
        if self.prompt_template is None or self.reference_template is None:
            return read_questions(self.dataset_name, self.dataset_split, limit)
        return list(islice(self._from_columns(read_rows(self.dataset_name, self.dataset_split)), limit))

    def _from_columns(self, source: Source) -> Iterator[EvalSample]:
        templates = {"prompt": str(self.prompt_template), "reference": str(self.reference_template)}
        for number, row in enumerate(source.rows()):
            made = {}
            for what, template in templates.items():
                for column in template_columns(template):
                    if column not in row:
                        held = ", ".join(row)
                        raise UserError(f"{source.where(number)} lacks the column {column!r}; it has {held}")
                made[what] = template.format_map(row).strip()
                if not made[what]:
                    raise UserError(f"{source.where(number)} has an empty {what}")
            yield EvalSample(number, made["prompt"], made["reference"], source.where(number))


def read_generation_task(file: str | Path | None, given: Mapping[str, Any]) -> GenerationTask:
    """The task of a file and of flags, of which those that are not None win.

    Raises:
        UserError: no such file, no YAML, a key or a metric that there is not, one of another kind, one template
            without the other, or nothing to ask.
    """
    written = read_task_file(Path(file)) if file is not None else {}
    known = [field.name for field in fields(GenerationTask)]
    for key, value in written.items():
        if key not in known:
            raise UserError(f"{file}: there is no key {key!r}{did_you_mean(key, known)}")
        kind, said = _KINDS.get(key, (str, "a text"))
        if type(value) is not kind:
            raise UserError(f"{file}: {key} is {str(value)[:40]!r}: it is {said}")
    values = {**written, **{key: value for key, value in given.items() if value is not None}}
    if not values.get("dataset_name"):
        raise UserError("there is nothing to ask: say --dataset_name or --task")
    if ("prompt_template" in values) != ("reference_template" in values):
        raise UserError(f"{file}: prompt_template and reference_template go together: give both or neither")
    for template in ("prompt_template", "reference_template"):
        if template in values:
            template_columns(values[template])
    for metric in values.get("metrics", ()):
        if metric not in METRICS:
            raise UserError(f"{file}: there is no metric {metric!r}; there are {', '.join(METRICS)}")
    return GenerationTask(**{**values, "metrics": tuple(values.get("metrics", METRICS))})
