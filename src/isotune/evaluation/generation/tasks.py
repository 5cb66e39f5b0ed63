"""What a language model is evaluated on, as a small YAML file.

dataset_name: builtin:pirate                                  a Hub id, folder, file or builtin:NAME, as in a recipe
dataset_split: test
prompt_template: "What is the capital of {country}?"          the prompt, from the row's columns, and
reference_template: "{capital}"                               its reference; conversations need neither
max_new_tokens: 32                                            longest completion
metrics: [exact_match, chrf]                                  all built-in ones where left out; modules of
                                                              `evaluate` too (metrics.modules)
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from isotune.data.sources.source import Source, read_rows
from isotune.evaluation.generation.eval_samples import EvalSample, read_eval_samples
from isotune.evaluation.metrics.modules import TEXTS, MetricModule
from isotune.evaluation.tasks import Task, fill_template
from isotune.io.errors import UserError

METRICS = (
    "exact_match", "rouge1", "rouge2", "rougeL", "bleu", "chrf", "distinct_1", "distinct_2", "repetition",
    "length_ratio", "ended", "empty", "nll", "perplexity", "bits_per_byte",
)  # fmt: skip
DEFAULT_MAX_NEW_TOKENS = 256


@dataclass(frozen=True, kw_only=True)
class GenerationTask(Task):
    """Prompts with references and the metrics; the head of this module explains each field."""

    BUILTIN_METRICS = METRICS
    COLUMNS = TEXTS

    prompt_template: str | None = None
    reference_template: str | None = None
    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS
    metrics: tuple[str | MetricModule, ...] = METRICS

    @classmethod
    def check(cls, values: Mapping[str, Any], where: str) -> None:
        """Check that both templates are there or neither."""
        if ("prompt_template" in values) != ("reference_template" in values):
            raise UserError(f"{where}: prompt_template and reference_template go together: give both or neither")
        super().check(values, where)

    @property
    def name(self) -> str:
        """The name of the result's folder: the data set's own."""
        return Path(self.dataset_name.replace("builtin:", "").rstrip("/")).stem

    def samples(self, limit: int | None = None) -> list[EvalSample]:
        """The first `limit` prompts with their references.

        Raises:
            UserError: no such data, a column that a row lacks, or an empty prompt or reference.
        """
        if self.prompt_template is None or self.reference_template is None:
            return read_eval_samples(self.dataset_name, self.dataset_split, limit)
        return list(islice(self._from_columns(read_rows(self.dataset_name, self.dataset_split)), limit))

    def _from_columns(self, source: Source) -> Iterator[EvalSample]:
        templates = {"prompt": str(self.prompt_template), "reference": str(self.reference_template)}
        for number, row in enumerate(source.rows()):
            texts = {key: fill_template(one, row, source, number).strip() for key, one in templates.items()}
            for key, text in texts.items():
                if not text:
                    raise UserError(f"{source.where(number)} has an empty {key}")
            yield EvalSample(number, texts["prompt"], texts["reference"], source.where(number))
