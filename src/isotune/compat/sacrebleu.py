"""sacrebleu 2.6: the sums that its corpus scores are computed from.

sacrebleu's own bootstrap sums these statistics, and no public function returns them. With them a resample of the rows
costs a sum, not another count of n-grams.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np


def corpus_statistics(scorer: Any, texts: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """What each text adds to the sums of a BLEU or CHRF scorer: float64 [texts, sums]."""
    return np.array(scorer._extract_corpus_statistics(texts, [references]), np.float64)


def score_of_statistics(scorer: Any, sums: np.ndarray) -> np.ndarray:
    """The scores of sums, [block, sums] -> [block, 1], from 0 to 100."""
    return np.array([[scorer._compute_score_from_stats(row).score] for row in sums.tolist()])
