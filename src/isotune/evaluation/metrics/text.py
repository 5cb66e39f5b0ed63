"""What is measured of generated texts, each metric by sums over rows, so that its interval needs no second look.

A metric is a function of sums: of values and of rows for a mean, of matched n-grams for BLEU. Resampling the rows
resamples the sums. ROUGE is rouge-score's (0 to 1, F1, without stemming; it sees Latin letters and digits only), BLEU
and chrF are sacrebleu's (0 to 100).
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from isotune.evaluation.statistics import resampling
from isotune.evaluation.statistics.resampling import OfSums

ROUGE = ("rouge1", "rouge2", "rougeL")
REPETITION_ORDER = 4


@dataclass(frozen=True)
class TextMetric:
    """A metric of many rows.

    Attributes:
        of_rows: float64 [rows]; of each row by itself.
        of_all: over all rows.
    """

    of_rows: np.ndarray
    of_all: OfSums


def measure_texts(texts: Sequence[str], references: Sequence[str], ended: Sequence[bool]) -> dict[str, TextMetric]:
    """The metrics of completions beside their references, by name.

    exact_match, ended and empty are shares of rows. distinct_1 and distinct_2 are the mean share of a completion's
    words or pairs of words that are different ones (Li et al. 2016), 0 where it has none; repetition is the mean share
    of its four-word sequences that stood in it before (Welleck et al. 2020), 0 where it has none. length_ratio is
    characters of all completions over those of all references.

    Args:
        texts: without white space around them.
        references: as many, without white space around them and none empty.
        ended: whether the model ended the text by itself.
    """
    pairs = list(zip(texts, references, strict=True))
    return {
        "exact_match": _share("exact_match", [text == reference for text, reference in pairs]),
        **_rouge(pairs),
        **_sacrebleu(texts, references),
        "distinct_1": _share("distinct_1", [_different(text, 1) or 0.0 for text in texts]),
        "distinct_2": _share("distinct_2", [_different(text, 2) or 0.0 for text in texts]),
        "repetition": _share("repetition", [1 - (_different(text, REPETITION_ORDER) or 1.0) for text in texts]),
        "length_ratio": _ratio("length_ratio", [len(text) for text, _ in pairs], [len(wanted) for _, wanted in pairs]),
        "ended": _share("ended", ended),
        "empty": _share("empty", [not text for text in texts]),
    }


class Scored(Protocol):
    """How likely a reference is: `generation.likelihood.Likelihood`, or its numbers read back without torch."""

    @property
    def nll(self) -> float:
        """Nats."""
        ...

    @property
    def tokens(self) -> int:
        """That were scored."""
        ...

    @property
    def bytes(self) -> int:
        """Of their text."""
        ...


def measure_likelihoods(found: Sequence[Scored]) -> dict[str, TextMetric]:
    """nll (mean nats of a reference), perplexity (a token of all) and bits_per_byte (of all), by name."""
    nats = [one.nll for one in found]
    return {
        "nll": _mean("nll", nats),
        "perplexity": _ratio("perplexity", nats, [one.tokens for one in found], np.exp),
        "bits_per_byte": _ratio("bits_per_byte", nats, [one.bytes for one in found], lambda nats: nats / math.log(2)),
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


def _different(text: str, order: int) -> float | None:
    """The share of different ones among the sequences of `order` words; None where there is none."""
    words = text.split()
    sequences = [tuple(words[i : i + order]) for i in range(len(words) - order + 1)]
    return len(set(sequences)) / len(sequences) if sequences else None


def _rouge(pairs: Sequence[tuple[str, str]]) -> dict[str, TextMetric]:
    silenced = logging.root.manager.disable
    logging.disable(logging.WARNING)  # absl says which tokenizer it uses
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
    kinds = {"bleu": (BLEU(force=True), BLEU(effective_order=True)), "chrf": (CHRF(), CHRF())}
    found = {}
    for name, (of_all, of_one) in kinds.items():
        # sacrebleu has no public form of what its own bootstrap sums (2.6)
        columns = np.array(of_all._extract_corpus_statistics(texts, [references]), np.float64)

        def scores(sums: np.ndarray, metric: BLEU | CHRF = of_all) -> np.ndarray:
            return np.array([[metric._compute_score_from_stats(one).score] for one in sums.tolist()])

        found[name] = TextMetric(scores(columns, of_one)[:, 0], OfSums((name,), columns, scores))
    return found


def signatures() -> dict[str, str]:
    """How BLEU and chrF were computed, in sacrebleu's words; a score without them cannot be compared."""
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    said = {}
    for name, metric in {"bleu": BLEU(force=True), "chrf": CHRF()}.items():
        metric.corpus_score(["a"], [["a"]])
        said[name] = str(metric.get_signature())
    return said
