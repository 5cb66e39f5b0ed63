"""A model asked the questions of a data set: its answers, their metrics with intervals, and the files of both."""

import html
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from isotune.data.sft.conversations import render_prompt
from isotune.evaluation.distributed_eval import Ranks
from isotune.evaluation.generation.batched_generation import Completion, GenerationModel, Prompt, complete
from isotune.evaluation.generation.decoding import Decoding, first_turn
from isotune.evaluation.generation.eval_samples import EvalSample
from isotune.evaluation.generation.likelihood import Reference, score_references
from isotune.evaluation.generation.tasks import METRICS, GenerationTask
from isotune.evaluation.metrics.text import TextMetric, measure_likelihoods, measure_texts, signatures
from isotune.evaluation.results import GENERATION, rows_digest, write_result
from isotune.evaluation.statistics.resampling import bootstrap_intervals, values
from isotune.io.files import replace_file

EXAMPLES = "examples.md"
SHOWN_ON_TERMINAL, SHOWN_IN_FILE = 3, 50


@dataclass(frozen=True)
class GenerationResult:
    """What came of it, the same on every rank.

    Attributes:
        texts: the answers, in the order of the questions.
        metrics: by name; `of_rows` in the order of the questions.
        intervals: 95%, by the same names.
        cut: references that are longer than the model has positions, scored as far as it has.
    """

    questions: Sequence[EvalSample]
    completions: Sequence[Completion]
    texts: Sequence[str]
    metrics: dict[str, TextMetric]
    values: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    cut: int


def evaluate_generation(
    speaker: GenerationModel,
    questions: Sequence[EvalSample],
    decoding: Decoding,
    ranks: Ranks,
    *,
    batch_size: int,
    metrics: Sequence[str] = METRICS,
) -> GenerationResult:
    """Ask every question, and score every reference.

    Args:
        speaker: on every rank.
        questions: the same on every rank.
        decoding: how the answers are made.
        ranks: which share them.
        batch_size: questions that one forward pass sees; it changes no result.
        metrics: which to keep.

    Raises:
        UserError: a question leaves the model no position for an answer; the sentence names its row.
    """
    prompts = [Prompt(q.id, render_prompt(q.prompt), f"the question in {q.where}") for q in questions]
    completed = complete(speaker, prompts, decoding, batch_size=batch_size, ranks=ranks, progress=ranks.is_main)
    # the space belongs to the answer, as in training
    references = [Reference(q.id, p.text, " " + q.reference) for q, p in zip(questions, prompts, strict=True)]
    scored = score_references(speaker, references, ranks)
    completions = [completed[q.id] for q in questions]
    texts = [first_turn(completion.text) for completion in completions]
    likelihoods = [scored[q.id] for q in questions]
    measured = {
        **measure_texts(texts, [q.reference for q in questions], [c.ended for c in completions]),
        **measure_likelihoods(likelihoods),
    }
    kept = {name: metric for name, metric in measured.items() if name in metrics}
    statistics = [metric.of_all for metric in kept.values()]
    return GenerationResult(
        questions=questions,
        completions=completions,
        texts=texts,
        metrics=kept,
        values=values(statistics),
        intervals=bootstrap_intervals(statistics, len(questions), seed=decoding.seed),
        cut=sum(not one.whole for one in likelihoods),
    )


def write_generation_result(
    done: GenerationResult, folder: Path, *, model: str, task: GenerationTask, decoding: Decoding
) -> None:
    """metrics.json, predictions.jsonl and examples.md in `folder`."""
    facts: dict[str, Any] = {
        "kind": GENERATION,
        "model": model,
        "dataset_name": task.dataset_name,
        "dataset_split": task.dataset_split,
        "rows": len(done.questions),
        "rows_sha256": rows_digest((q.id, q.prompt + "\n" + q.reference) for q in done.questions),
        "decoding": asdict(decoding),
        "signatures": signatures(),
        "references": {"longer_than_positions": done.cut},
    }
    replace_file(_ready(folder) / EXAMPLES, render_examples(done, model, task.dataset_name))
    write_result(folder, facts, done.values, done.intervals, predictions(done))


def predictions(done: GenerationResult) -> list[dict[str, Any]]:
    """A line a question: its text, its answer, and every metric of this row alone."""
    return [
        {
            "id": question.id,
            "prompt": question.prompt,
            "reference": question.reference,
            "text": text,
            "tokens": len(completion.tokens),
            **{name: float(metric.of_rows[row]) for name, metric in done.metrics.items()},
        }
        for row, (question, completion, text) in enumerate(
            zip(done.questions, done.completions, done.texts, strict=True)
        )
    ]


def print_generation_result(done: GenerationResult) -> None:
    """The first answers beside their references, the exact matches, and every metric with its interval."""
    matches = [text == question.reference for question, text in zip(done.questions, done.texts, strict=True)]
    for question, text, match in list(zip(done.questions, done.texts, matches, strict=True))[:SHOWN_ON_TERMINAL]:
        print(f"  {'=' if match else 'x'} {question.prompt}")
        print(f"    answer     {text}\n    reference  {question.reference}")
    print(f"exact match {sum(matches)} of {len(matches)} ({sum(matches) / len(matches):.1%})")
    print(f"  {'metric':<14} {'value':>10}   95% interval")
    for name, value in done.values.items():
        low, high = done.intervals[name]
        print(f"  {name:<14} {value:>10.4f}   {low:.4f} to {high:.4f}")
    if done.cut:
        print(f"{done.cut} references are longer than the model has positions, and are scored as far as it has")


def render_examples(done: GenerationResult, model: str, dataset_name: str) -> str:
    """A Markdown table of the first answers beside their references."""
    head = f"# {model} on {dataset_name}: {min(SHOWN_IN_FILE, len(done.texts))} of {len(done.texts)} answers\n\n"
    lines = ["| row | question | answer | reference |", "|---|---|---|---|"]
    for question, text in list(zip(done.questions, done.texts, strict=True))[:SHOWN_IN_FILE]:
        cells = " | ".join(_cell(one) for one in (question.prompt, text, question.reference))
        lines.append(f"| {question.id} | {cells} |")
    return head + "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """A text as one cell of a Markdown table, whatever stands in it."""
    return html.escape(text, quote=False).replace("|", "&#124;").replace("\n", "<br>").replace("\r", "")


def _ready(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
