"""Answers of an evaluation beside others to the same questions, as a judge prefers them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from isotune.data.documents import with_share
from isotune.evaluation.distributed_eval import Ranks
from isotune.evaluation.judging.judges import kind_of, open_judge
from isotune.evaluation.judging.verdicts import TIE, Pair
from isotune.evaluation.judging.win_rates import scores_of, win_rates
from isotune.evaluation.results import GENERATION, METRICS, find_results, read_result, rows_digest
from isotune.evaluation.statistics.resampling import Scores, score
from isotune.evaluation.tasks import EvalSample
from isotune.io.errors import UserError

REFERENCE = "reference"


@dataclass(frozen=True)
class Judging:
    """Who judges, and what beside: `others` are the answers of the other side by the row's id."""

    judge: str
    model: str | None
    against: str
    others: Mapping[Any, str]

    def decisive(self) -> dict[str, Any]:
        """What decides the verdicts, as JSON can hold it."""
        return {"judge": self.judge, "judge_model": self.model, "judge_against": self.against}


@dataclass(frozen=True)
class Judgement:
    """The verdicts on an evaluation's answers."""

    scores: Scores
    of_rows: list[dict[str, Any]]  # for predictions.jsonl
    facts: dict[str, Any]  # for metrics.json


def plan_judging(judge: str, model: str | None, against: str | None, samples: Sequence[EvalSample]) -> Judging:
    """What is judged: against the references, or the stored answers of a run or result to the same questions.

    UserError where it has no result of these rows.
    """
    if against in (None, REFERENCE):
        return Judging(judge, model, REFERENCE, {sample.id: sample.reference for sample in samples})
    folder = Path(against)
    own = rows_digest((sample.id, f"{sample.prompt}\n{sample.reference}") for sample in samples)
    candidates = [folder] if (folder / METRICS).is_file() else find_results(folder)
    for candidate in candidates:
        result = read_result(candidate)
        if result.facts["kind"] == GENERATION and result.facts["rows_sha256"] == own:
            return Judging(judge, model, str(candidate), {row["id"]: str(row["text"]) for row in result.predictions})
    raise UserError(
        f"--judge_against {against}: it has no evaluation of these {len(samples):,} questions: evaluate it on the same "
        f"data and --limit first, or say {REFERENCE}"
    )


def judge_answers(judging: Judging, rows: Sequence[Mapping[str, Any]], ranks: Ranks, seed: int) -> Judgement | None:
    """Ask of each row's answer in both orders; None on the ranks that did not ask.

    `rows` are those of predictions.jsonl, the same on every rank. A verdict that cannot be read counts as a tie;
    UserError where most are such.
    """
    judge, kind = open_judge(judging.judge, ranks, judging.model), kind_of(judging.judge, judging.model)
    if judge is None:
        return None
    others = [judging.others[row["id"]] for row in rows]
    asked = [(row["prompt"], row["text"], other, f"row {row['id']}") for row, other in zip(rows, others, strict=True)]
    in_order = [Pair(question, own, other, where) for question, own, other, where in asked]
    swapped = [Pair(question, other, own, where) for question, own, other, where in asked]
    said = judge.verdicts([*in_order, *swapped])
    unreadable = sum(one is None for one in said)
    if unreadable > len(said) / 2:
        raise UserError(
            f"--judge {judging.judge}: {with_share(unreadable, len(said))} of its {len(said):,} verdicts cannot be "
            "read: it ends with [[A]], [[B]] or [[C]]"
        )
    shares = [TIE if one is None else one for one in said]
    first, second = shares[: len(rows)], shares[len(rows) :]
    values, agree = scores_of(first, second)
    lengths = np.array([[len(row["text"]), len(other)] for row, other in zip(rows, others, strict=True)])
    statistics = win_rates(values, agree, lengths[:, 0], lengths[:, 1])
    facts = {"name": judging.judge, "kind": kind, "against": judging.against, "unreadable": unreadable}
    model = getattr(judge, "model", None)
    return Judgement(
        score(statistics, len(rows), seed=seed),
        [
            {"judge": value, "judge_orders": orders}
            for value, *orders in zip(values.tolist(), first, second, strict=True)
        ],
        facts | ({"model": model} if model else {}),
    )
