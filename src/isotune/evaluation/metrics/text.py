"""Metrics of generated texts, each as a function of sums over rows, so that resampling the rows gives its interval.

The sums are of values and rows for a mean, of matched n-grams for BLEU. ROUGE is rouge-score's (0 to 1, F1, without
stemming; Latin letters and digits only), BLEU and chrF are sacrebleu's (0 to 100).
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from isotune.compat.sacrebleu import corpus_statistics, score_of_statistics
from isotune.evaluation.statistics.resampling import OfSums, mean, share

ROUGE = ("rouge1", "rouge2", "rougeL")
TEXT_METRICS = (
    "exact_match", *ROUGE, "bleu", "chrf", "distinct_1", "distinct_2", "repetition", "length_ratio", "ended", "empty",
    "nll", "perplexity", "bits_per_byte",
)  # fmt: skip
REPETITION_ORDER = 4


@dataclass(frozen=True)
class TextMetric:
    """A metric over all rows, and of each row alone: float64 [rows]."""

    of_rows: np.ndarray
    of_all: OfSums


def measure_texts(texts: Sequence[str], references: Sequence[str], ended: Sequence[bool]) -> dict[str, TextMetric]:
    """The metrics of completions, stripped, beside their references, stripped and not empty, by name.

    exact_match, ended (by the model, not its token limit) and empty are shares of rows. distinct_1 and distinct_2 are
    the mean share of distinct words or pairs of words in a completion (Li et al. 2016), 0 where it has none; repetition
    is the mean share of its four-word sequences that occur in it before (Welleck et al. 2020), 0 where it has none.
    length_ratio is the characters of all completions over those of all references.
    """
    pairs = list(zip(texts, references, strict=True))
    shares: dict[str, Sequence[float]] = {
        "exact_match": [text == reference for text, reference in pairs],
        **_rouge(pairs),
        "distinct_1": [_distinct(text, 1) or 0.0 for text in texts],
        "distinct_2": [_distinct(text, 2) or 0.0 for text in texts],
        "repetition": [1 - (_distinct(text, REPETITION_ORDER) or 1.0) for text in texts],
        "ended": ended,
        "empty": [not text for text in texts],
    }
    metrics = {name: _metric(share(name, np.asarray(values, np.float64))) for name, values in shares.items()}
    metrics["length_ratio"] = _ratio("length_ratio", [*map(len, texts)], [*map(len, references)])
    metrics |= _sacrebleu(texts, references)
    return {name: metrics[name] for name in TEXT_METRICS if name in metrics}


@dataclass(frozen=True)
class Likelihood:
    """The negative log-likelihood of a reference after its prompt."""

    nll: float  # nats, summed over its tokens
    tokens: int  # number of tokens that were scored
    bytes: int  # bytes of their text, in UTF-8
    whole: bool = True  # the model has positions for all of the reference; else the rest is not counted


def measure_likelihoods(likelihoods: Sequence[Likelihood]) -> dict[str, TextMetric]:
    """nll (mean nats of a reference), perplexity (over all tokens) and bits_per_byte (over all bytes), by name."""
    nats = [likelihood.nll for likelihood in likelihoods]
    return {
        "nll": _metric(mean("nll", np.asarray(nats, np.float64))),
        "perplexity": _ratio("perplexity", nats, [one.tokens for one in likelihoods], np.exp),
        "bits_per_byte": _ratio("bits_per_byte", nats, [one.bytes for one in likelihoods], lambda n: n / math.log(2)),
    }


def _metric(statistic: OfSums) -> TextMetric:
    return TextMetric(statistic.function(statistic.columns)[:, 0], statistic)


def _ratio(
    name: str, above: Sequence[float], below: Sequence[float], then: Callable[[np.ndarray], np.ndarray] = np.asarray
) -> TextMetric:
    columns = np.column_stack([above, below]).astype(np.float64)
    return _metric(OfSums((name,), columns, lambda sums: then(sums[:, :1] / sums[:, 1:])))


def _distinct(text: str, order: int) -> float | None:
    """The share of distinct sequences among the sequences of `order` words; None where there is no sequence."""
    words = text.split()
    sequences = [tuple(words[i : i + order]) for i in range(len(words) - order + 1)]
    return len(set(sequences)) / len(sequences) if sequences else None


def _rouge(pairs: Sequence[tuple[str, str]]) -> dict[str, list[float]]:
    silenced = logging.root.manager.disable
    logging.disable(logging.WARNING)  # absl logs which tokenizer it uses
    try:
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer(list(ROUGE))
        scores = [scorer.score(reference, text) for text, reference in pairs]
    finally:
        logging.disable(silenced)
    return {name: [score[name].fmeasure for score in scores] for name in ROUGE}


def _scorers() -> dict[str, tuple[Any, Any]]:
    """sacrebleu's scorers of all rows and of one."""
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    # of one sentence, BLEU leaves out the orders that it is too short for, as sacrebleu advises
    return {"bleu": (BLEU(force=True), BLEU(effective_order=True)), "chrf": (CHRF(), CHRF())}


def _sacrebleu(texts: Sequence[str], references: Sequence[str]) -> dict[str, TextMetric]:
    metrics = {}
    for name, (of_corpus, of_sentence) in _scorers().items():
        columns = corpus_statistics(of_corpus, texts, references)
        of_all = OfSums((name,), columns, partial(score_of_statistics, of_corpus))
        metrics[name] = TextMetric(score_of_statistics(of_sentence, columns)[:, 0], of_all)
    return metrics


def signatures() -> dict[str, str]:
    """sacrebleu's signatures of BLEU and chrF; scores with other signatures cannot be compared."""
    texts = {}
    for name, (scorer, _) in _scorers().items():
        scorer.corpus_score(["a"], [["a"]])
        texts[name] = str(scorer.get_signature())
    return texts
