"""One evaluation of a language model, from prompts to files: completions, metrics with intervals, examples."""

import html
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from isotune.data.sft.conversations import first_turn, render_prompt
from isotune.evaluation.distributed_eval import Ranks
from isotune.evaluation.generation.completion import Decoding, Prompt, complete
from isotune.evaluation.generation.likelihood import Reference, score_references
from isotune.evaluation.metrics.modules import MetricModule, score_modules, split_metrics, text_columns
from isotune.evaluation.metrics.text import measure_likelihoods, measure_texts, signatures
from isotune.evaluation.models import GenerationModel
from isotune.evaluation.results import GENERATION, rows_digest, score_lines, write_result
from isotune.evaluation.statistics.resampling import Scores, score
from isotune.evaluation.tasks import EvalSample, GenerationTask
from isotune.io.files import replace_file

EXAMPLES = "examples.md"
SHOWN_ON_TERMINAL, SHOWN_IN_FILE = 3, 50


@dataclass(frozen=True)
class GenerationResult:
    """The result of an evaluation, the same on every rank.

    Attributes:
        predictions: for each sample its prompt, reference, completion, and every built-in metric of this row alone.
        scores: of the built-in metrics and the modules.
        truncated: references longer than the model's positions; the rest is not scored.
    """

    predictions: list[dict[str, Any]]
    scores: Scores
    truncated: int


def evaluate_generation(
    lm: GenerationModel,
    samples: Sequence[EvalSample],
    decoding: Decoding,
    ranks: Ranks,
    *,
    batch_size: int,
    metrics: Sequence[str | MetricModule],
) -> GenerationResult:
    """Complete every prompt, and score every reference; every rank has the same samples and does its share.

    Args:
        batch_size: prompts of one forward; it changes no result.
        metrics: built-in names and modules.

    Raises:
        UserError: a prompt leaves the model no position for a completion, or a module cannot be computed.
    """
    prompts = [Prompt(s.id, render_prompt(s.prompt), f"the question in {s.where}") for s in samples]
    completed = complete(lm, prompts, decoding, batch_size=batch_size, ranks=ranks, progress=ranks.is_main)
    # the space belongs to the answer, as in training
    scored_references = [Reference(s.id, p.text, " " + s.reference) for s, p in zip(samples, prompts, strict=True)]
    likelihood_of = score_references(lm, scored_references, ranks)
    completions = [completed[sample.id] for sample in samples]
    likelihoods = [likelihood_of[sample.id] for sample in samples]
    texts = [first_turn(completion.text) for completion in completions]
    references = [sample.reference for sample in samples]
    measured = measure_texts(texts, references, [completion.ended for completion in completions])
    measured |= measure_likelihoods(likelihoods)
    names, modules = split_metrics(metrics)
    kept = {name: metric for name, metric in measured.items() if name in names}
    scores = score([metric.of_all for metric in kept.values()], len(samples), seed=decoding.seed)
    columns = text_columns(texts, references, [sample.prompt for sample in samples])
    scores |= score_modules(modules, columns, len(samples), seed=decoding.seed)
    predictions = [
        {
            "id": sample.id,
            "prompt": sample.prompt,
            "reference": sample.reference,
            "text": text,
            "tokens": len(completion.tokens),
            **{name: float(metric.of_rows[row]) for name, metric in kept.items()},
        }
        for row, (sample, completion, text) in enumerate(zip(samples, completions, texts, strict=True))
    ]
    return GenerationResult(predictions, scores, sum(not likelihood.whole for likelihood in likelihoods))


def write_generation_result(
    result: GenerationResult, folder: Path, *, model: str, task: GenerationTask, decoding: Decoding
) -> None:
    """metrics.json, predictions.jsonl and examples.md in `folder`."""
    rows, scores = result.predictions, result.scores
    facts: dict[str, Any] = {
        "kind": GENERATION,
        "model": model,
        "dataset_name": task.dataset_name,
        "dataset_split": task.dataset_split,
        "rows": len(rows),
        "rows_sha256": rows_digest((row["id"], row["prompt"] + "\n" + row["reference"]) for row in rows),
        "decoding": asdict(decoding),
        "signatures": signatures(),
        "references": {"longer_than_positions": result.truncated},
        **({"metric_modules": scores.modules} if scores.modules else {}),
    }
    head = f"# {model} on {task.dataset_name}: {min(SHOWN_IN_FILE, len(rows))} of {len(rows)} answers\n\n"
    lines = ["| row | question | answer | reference |", "|---|---|---|---|"]
    for row in rows[:SHOWN_IN_FILE]:
        lines.append(f"| {row['id']} | {' | '.join(_cell(row[key]) for key in ('prompt', 'text', 'reference'))} |")
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / EXAMPLES, head + "\n".join(lines) + "\n")
    write_result(folder, facts, scores.metrics, scores.intervals, rows)


def _cell(text: str) -> str:
    """A text escaped as one cell of a Markdown table."""
    return html.escape(text, quote=False).replace("|", "&#124;").replace("\n", "<br>").replace("\r", "")


def print_generation_result(result: GenerationResult) -> None:
    """The first completions beside their references, the exact matches, and every metric with its interval."""
    rows = result.predictions
    matches = [row["text"] == row["reference"] for row in rows]
    for row, match in list(zip(rows, matches, strict=True))[:SHOWN_ON_TERMINAL]:
        print(f"  {'=' if match else 'x'} {row['prompt']}")
        print(f"    answer     {row['text']}\n    reference  {row['reference']}")
    print(f"exact match {sum(matches)} of {len(matches)} ({sum(matches) / len(matches):.1%})")
    print("\n".join(score_lines(result.scores)))
    if result.truncated:
        print(f"{result.truncated} references are longer than the model's positions; the rest of them is not scored")
