"""Metrics of generated texts, each as a function of sums over rows, so that resampling the rows gives its interval.

The sums are of values and rows for a mean, of matched n-grams for BLEU. ROUGE is rouge-score's (0 to 1, F1, without
stemming; Latin letters and digits only), BLEU and chrF are sacrebleu's (0 to 100).
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from isotune.compat.sacrebleu import corpus_statistics, score_of_statistics
from isotune.evaluation.statistics import resampling
from isotune.evaluation.statistics.resampling import OfSums

ROUGE = ("rouge1", "rouge2", "rougeL")
REPETITION_ORDER = 4


@dataclass(frozen=True)
class TextMetric:
    """A metric of many rows.

    Attributes:
        of_rows: float64 [rows]; the metric of each row alone.
        of_all: the metric over all rows.
    """

    of_rows: np.ndarray
    of_all: OfSums


def measure_texts(texts: Sequence[str], references: Sequence[str], ended: Sequence[bool]) -> dict[str, TextMetric]:
    """The metrics of completions beside their references, by name.

    exact_match, ended and empty are shares of rows. distinct_1 and distinct_2 are the mean share of distinct words or
    pairs of words in a completion (Li et al. 2016), 0 where it has none; repetition is the mean share of its four-word
    sequences that occur in it before (Welleck et al. 2020), 0 where it has none. length_ratio is the characters of all
    completions over those of all references.

    Args:
        texts: completions, stripped.
        references: as many, stripped and not empty.
        ended: whether the model ended the text, and not its token limit.
    """
    pairs = list(zip(texts, references, strict=True))
    return {
        "exact_match": _share("exact_match", [text == reference for text, reference in pairs]),
        **_rouge(pairs),
        **_sacrebleu(texts, references),
        "distinct_1": _share("distinct_1", [_distinct(text, 1) or 0.0 for text in texts]),
        "distinct_2": _share("distinct_2", [_distinct(text, 2) or 0.0 for text in texts]),
        "repetition": _share("repetition", [1 - (_distinct(text, REPETITION_ORDER) or 1.0) for text in texts]),
        "length_ratio": _ratio("length_ratio", [len(text) for text in texts], [len(text) for text in references]),
        "ended": _share("ended", ended),
        "empty": _share("empty", [not text for text in texts]),
    }


@dataclass(frozen=True)
class Likelihood:
    """The negative log-likelihood of a reference after its prompt.

    Attributes:
        nll: nats, summed over its tokens.
        tokens: number of tokens that were scored.
        bytes: bytes of their text, in UTF-8.
        whole: the model has positions for all of the reference; else the rest is not counted.
    """

    nll: float
    tokens: int
    bytes: int
    whole: bool = True

    @property
    def perplexity(self) -> float:
        """Per token."""
        return math.exp(self.nll / self.tokens)

    @property
    def bits_per_byte(self) -> float:
        """Bits for each byte of the text when it is encoded with this model."""
        return self.nll / self.bytes / math.log(2)


def measure_likelihoods(likelihoods: Sequence[Likelihood]) -> dict[str, TextMetric]:
    """nll (mean nats of a reference), perplexity (over all tokens) and bits_per_byte (over all bytes), by name."""
    nats = [likelihood.nll for likelihood in likelihoods]
    tokens, byte_counts = [one.tokens for one in likelihoods], [one.bytes for one in likelihoods]
    return {
        "nll": _mean("nll", nats),
        "perplexity": _ratio("perplexity", nats, tokens, np.exp),
        "bits_per_byte": _ratio("bits_per_byte", nats, byte_counts, lambda nats: nats / math.log(2)),
    }


def _mean(name: str, values: Sequence[float]) -> TextMetric:
    of_rows = np.asarray(values, np.float64)
    return TextMetric(of_rows, resampling.mean(name, of_rows))


def _share(name: str, values: Sequence[float]) -> TextMetric:
    of_rows = np.asarray(values, np.float64)
    return TextMetric(of_rows, resampling.share(name, of_rows))


def _ratio(
    name: str, above: Sequence[float], below: Sequence[float], then: Callable[[np.ndarray], np.ndarray] = np.asarray
) -> TextMetric:
    columns = np.column_stack([above, below]).astype(np.float64)

    def of_sums(sums: np.ndarray) -> np.ndarray:
        return then(sums[:, :1] / sums[:, 1:])

    return TextMetric(of_sums(columns)[:, 0], OfSums((name,), columns, of_sums))


def _distinct(text: str, order: int) -> float | None:
    """The share of distinct sequences among the sequences of `order` words; None where there is no sequence."""
    words = text.split()
    sequences = [tuple(words[i : i + order]) for i in range(len(words) - order + 1)]
    return len(set(sequences)) / len(sequences) if sequences else None


def _rouge(pairs: Sequence[tuple[str, str]]) -> dict[str, TextMetric]:
    silenced = logging.root.manager.disable
    logging.disable(logging.WARNING)  # absl logs which tokenizer it uses
    try:
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer(list(ROUGE))
        scores = [scorer.score(reference, text) for text, reference in pairs]
    finally:
        logging.disable(silenced)
    return {name: _share(name, [score[name].fmeasure for score in scores]) for name in ROUGE}


def _sacrebleu(texts: Sequence[str], references: Sequence[str]) -> dict[str, TextMetric]:
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    # of one sentence, BLEU leaves out the orders that it is too short for, as sacrebleu advises
    scorers = {"bleu": (BLEU(force=True), BLEU(effective_order=True)), "chrf": (CHRF(), CHRF())}
    metrics = {}
    for name, (corpus_scorer, sentence_scorer) in scorers.items():
        columns = corpus_statistics(corpus_scorer, texts, references)

        def scores(sums: np.ndarray, scorer: BLEU | CHRF = corpus_scorer) -> np.ndarray:
            return score_of_statistics(scorer, sums)

        metrics[name] = TextMetric(
            score_of_statistics(sentence_scorer, columns)[:, 0], OfSums((name,), columns, scores)
        )
    return metrics


def signatures() -> dict[str, str]:
    """sacrebleu's signatures of BLEU and chrF; scores with other signatures cannot be compared."""
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    texts = {}
    for name, metric in {"bleu": BLEU(force=True), "chrf": CHRF()}.items():
        metric.corpus_score(["a"], [["a"]])
        texts[name] = str(metric.get_signature())
    return texts
