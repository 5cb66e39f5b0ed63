"""One evaluation of a language model, from prompts to files: completions, likelihoods, metrics, examples.

The tokens of a reference are scored, not those of the prompt and not the eos. They are those of training, where prompt
and answer are tokenised as one text. The batches depend on the references alone and not on the number of processes, so
the sums are the same everywhere.
"""

import html
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from isotune.compat.torch import in_float64
from isotune.data.documents import with_share
from isotune.evaluation.distributed_eval import Ranks
from isotune.evaluation.generation.base_rules import rules_of_base
from isotune.evaluation.generation.completion import Decoding, Prompt, complete, own_batches
from isotune.evaluation.metrics.modules import MetricModule, score_modules, split_metrics, text_columns
from isotune.evaluation.metrics.text import Likelihood, measure_likelihoods, measure_texts, signatures
from isotune.evaluation.models import GenerationModel
from isotune.evaluation.results import GENERATION, score_lines, write_result
from isotune.evaluation.statistics.resampling import Scores, score
from isotune.evaluation.tasks import EvalSample, EvalSamples, GenerationTask
from isotune.io.errors import UserError
from isotune.io.files import replace_file
from isotune.models.layouts.fitting import FittingBatches, memory_in_one_sentence

EXAMPLES = "examples.md"
SHOWN_ON_TERMINAL, SHOWN_IN_FILE = 3, 50
BATCH_TOKENS = 2048  # of one forward, padding included; a longer row runs alone
CHUNK_POSITIONS = 256  # positions whose logits are converted to float64 at a time


@dataclass(frozen=True)
class GenerationResult:
    """The result of an evaluation, the same on every rank."""

    # for each sample its prompt, reference, completion, and every built-in metric of this row alone
    predictions: list[dict[str, Any]]
    scores: Scores  # of the built-in metrics and the modules
    truncated: int  # references longer than the model's positions; the rest is not scored
    rules_of_base: dict[str, Any]  # of the model's generation_config, which were not in effect
    judge: dict[str, Any] = field(default_factory=dict)  # who judged, beside what, and verdicts that could not be read

    def with_judgement(self, scores: Scores, of_rows: Sequence[dict[str, Any]], judge: dict[str, Any]) -> Self:
        """This, and what a judge said of it: further metrics, and keys of each prediction."""
        predictions = [row | judged for row, judged in zip(self.predictions, of_rows, strict=True)]
        return replace(self, predictions=predictions, scores=self.scores | scores, judge=judge)


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

    `batch_size` is the prompts of one forward and changes no result. A prompt that leaves the model no position for a
    completion, or a module that cannot be computed, is a UserError.
    """
    prompts = [prompt_of(lm, sample) for sample in samples]
    completed = complete(lm, prompts, decoding, batch_size=batch_size, ranks=ranks, progress=ranks.is_main)
    scored_references = [reference_of(lm, sample, prompt.text) for sample, prompt in zip(samples, prompts, strict=True)]
    likelihood_of = score_references(lm, scored_references, ranks)
    completions = [completed[sample.id] for sample in samples]
    likelihoods = [likelihood_of[sample.id] for sample in samples]
    texts = [lm.encoder.answer_in(one.text, prompt.text) for one, prompt in zip(completions, prompts, strict=True)]
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
    truncated = sum(not likelihood.whole for likelihood in likelihoods)
    return GenerationResult(predictions, scores, truncated, rules_of_base(lm.model))


def prompt_of(lm: GenerationModel, sample: EvalSample) -> Prompt:
    """A sample's question as the model is asked; UserError where its form has no place for it."""
    try:
        text = lm.encoder.prompt(sample.messages, sample.tools)
    except ValueError as error:
        raise UserError(f"the question in {sample.where} cannot be asked: {error}") from error
    return Prompt(sample.id, text, f"the question in {sample.where}")


def reference_of(lm: GenerationModel, sample: EvalSample, prompt: str) -> "Reference":
    """The reference as it stands behind its prompt in training, without what ends it."""
    try:
        text = lm.encoder.answered(sample.messages, sample.reference, sample.tools)
    except ValueError as error:
        raise UserError(f"the reference in {sample.where} cannot be written: {error}") from error
    if not text.startswith(prompt):
        what = "the chat template asks with another text than it writes before the answer"
        raise UserError(f"the reference in {sample.where} cannot be scored: {what}")
    return Reference(sample.id, prompt, text[len(prompt) :])


@dataclass(frozen=True)
class Reference:
    """A text that is scored after a prompt; `row` identifies it."""

    row: int
    prompt: str
    text: str


def score_references(
    lm: GenerationModel, references: Sequence[Reference], ranks: Ranks | None = None
) -> dict[int, Likelihood]:
    """The likelihood of each reference by its row; with `ranks` each process scores its share and gets them all.

    UserError where a likelihood is NaN or Inf.
    """
    encoded = [_encode(lm, reference) for reference in references]
    lengths = [len(input_ids) for input_ids, _ in encoded]
    batches = _batches(lengths)
    costs = [sum(lengths[i] for i in batch) for batch in batches]
    own: dict[int, Likelihood] = {}
    fitting = FittingBatches(halves=not lm.is_sharded)
    with memory_in_one_sentence(fitting, "shorter texts or 16-bit weights take less"):
        for batch in own_batches(lm, batches, costs, ranks):
            parts = fitting.run(
                batch,
                lambda some: len(some) * max((lengths[i] for i in some), default=0),
                lambda some: _score_batch(lm, [encoded[i] for i in some]),
            )
            for i, nll in ((i, nll) for some, nats in parts for i, nll in zip(some, nats, strict=True)):
                own[references[i].row] = replace(encoded[i][1], nll=nll)
    likelihoods = ranks.gather(own) if ranks else own
    broken = sorted(row for row, likelihood in likelihoods.items() if not math.isfinite(likelihood.nll))
    if broken:
        raise UserError(
            f"the model's scores are not finite for {len(broken)} of {len(likelihoods)} references, row "
            f"{broken[0] + 1} first: its weights are broken, or its precision is too small for them"
        )
    return likelihoods


def _encode(lm: GenerationModel, reference: Reference) -> tuple[list[int], Likelihood]:
    """The tokens of prompt and reference, and the likelihood of the reference, its nll to be computed."""
    whole_text, prefix = reference.prompt + reference.text, lm.encoder.prefix.tolist()
    tokens = lm.encoder.located(whole_text)
    start = len(reference.prompt)
    input_ids, ends = [*prefix, *tokens.ids.tolist()], [*([0] * len(prefix)), *tokens.ends.tolist()]
    # a token across the border is scored, as it is supervised in training
    first = next((i for i, end in enumerate(ends) if end > start), None)
    if first is None:
        raise UserError(f"the reference of row {reference.row + 1} is of no token")
    last = len(input_ids) - 1
    kept = min(last + 1, lm.positions)
    text = whole_text[start : ends[kept - 1]] if kept <= last else reference.text
    return input_ids[:kept], Likelihood(math.nan, kept - first, len(text.encode()), kept == last + 1)


def _batches(lengths: Sequence[int]) -> list[list[int]]:
    """Numbers of rows in batches of similar lengths, the longest first."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= BATCH_TOKENS:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def _score_batch(lm: GenerationModel, rows: list[tuple[list[int], Likelihood]]) -> list[float]:
    """Nats of each row, by one forward; without rows it only serves the ranks that have some."""
    filler = min(lm.eos_ids)
    tokens = [torch.tensor(input_ids) for input_ids, _ in rows] or [torch.tensor([filler])]
    # Padding on the right needs no mask in a causal model.
    input_ids = pad_sequence(tokens, batch_first=True, padding_value=filler).to(lm.device)
    with torch.no_grad():
        logits = lm.model(input_ids=input_ids, use_cache=False).logits
    nats = []
    for (own, likelihood), ids, scores in zip(rows, input_ids, logits, strict=False):
        first, end = len(own) - likelihood.tokens, len(own)
        chunks = scores[first - 1 : end - 1].split(CHUNK_POSITIONS), ids[first:end].split(CHUNK_POSITIONS)
        pairs = ((in_float64(c), t) for c, t in zip(*chunks, strict=True))
        nats.append(sum(cross_entropy(c, t.to(c.device), reduction="sum").item() for c, t in pairs))
    return nats


def write_generation_result(
    result: GenerationResult,
    folder: Path,
    *,
    model: str,
    task: GenerationTask,
    samples: EvalSamples,
    decoding: Decoding,
) -> None:
    """metrics.json, predictions.jsonl and examples.md in `folder`."""
    rows = result.predictions
    facts: dict[str, Any] = {
        "kind": GENERATION,
        "model": model,
        "dataset_name": task.dataset_name,
        "dataset_split": task.dataset_split,
        "decoding": asdict(decoding),
        "generation_config_not_in_effect": result.rules_of_base,
        "signatures": signatures(),
        "left_out": {"rows_read": samples.rows_read, "reasons": samples.left_out},
        **({"notes": list(samples.notes)} if samples.notes else {}),
        "references": {"longer_than_positions": result.truncated},
        **({"judge": result.judge} if result.judge else {}),
    }
    head = f"# {model} on {task.dataset_name}: {min(SHOWN_IN_FILE, len(rows))} of {len(rows)} answers\n\n"
    lines = ["| row | question | answer | reference |", "|---|---|---|---|"]
    for row in rows[:SHOWN_IN_FILE]:
        lines.append(f"| {row['id']} | {' | '.join(_cell(row[key]) for key in ('prompt', 'text', 'reference'))} |")
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / EXAMPLES, head + "\n".join(lines) + "\n")
    write_result(folder, facts, result.scores, rows, (row["prompt"] + "\n" + row["reference"] for row in rows))


def _cell(text: str) -> str:
    """A text escaped as one cell of a Markdown table."""
    return html.escape(text, quote=False).replace("|", "&#124;").replace("\n", "<br>").replace("\r", "")


def print_generation_result(result: GenerationResult, samples: EvalSamples) -> None:
    """The first completions beside their references, the exact matches, and every metric with its interval.

    Rows that were left out are counted by their reason, and what reading guessed is said.
    """
    rows = result.predictions
    matches = [row["text"] == row["reference"] for row in rows]
    for row, match in list(zip(rows, matches, strict=True))[:SHOWN_ON_TERMINAL]:
        print(f"  {'=' if match else 'x'} {row['prompt']}")
        print(f"    answer     {row['text']}\n    reference  {row['reference']}")
    print(f"exact match {sum(matches)} of {len(matches)} ({sum(matches) / len(matches):.1%})")
    print("\n".join(score_lines(result.scores)))
    if judge := result.judge:
        of_model = f" ({judge['model']})" if "model" in judge else ""
        unread = f"; {judge['unreadable']} of {2 * len(rows)} verdicts could not be read" if judge["unreadable"] else ""
        print(f"judge       {judge['name']}{of_model}, against {judge['against']}, each pair in both orders{unread}")
    for note in samples.notes:
        print(f"note        {note}")
    for reason, count in samples.left_out.items():
        print(f"left out    {with_share(count, samples.rows_read)} of {samples.rows_read:,} rows, {reason}")
    if result.truncated:
        print(f"{result.truncated} references are longer than the model's positions; the rest of them is not scored")
