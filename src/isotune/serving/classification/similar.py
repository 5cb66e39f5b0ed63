"""The errors of an evaluation that are most like a text, by words in common: what the model got wrong before."""

from collections.abc import Sequence
from typing import Any

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics.pairwise import linear_kernel

METHOD = "words and word pairs in common (cosine of TF-IDF)"
SHOWN = 5


class SimilarErrors:
    """Errors of an evaluation, as its examples.jsonl has them, to be found by a text like theirs."""

    def __init__(self, errors: Sequence[dict[str, Any]]) -> None:
        self.errors = list(errors)
        self._vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b")
        try:
            self._vectors = self._vectorizer.fit_transform([error["text"] for error in self.errors])
        except ValueError:  # no errors, or none with a word
            self._vectors = None

    def find(self, text: str, count: int = SHOWN) -> list[dict[str, Any]]:
        """At most `count` errors with a word of the text, the most similar first, each with its `similarity`."""
        if self._vectors is None:
            return []
        similarity = linear_kernel(self._vectorizer.transform([text]), self._vectors)[0]
        order = (-similarity).argsort(kind="stable")[:count]
        return [{**self.errors[i], "similarity": float(similarity[i])} for i in order.tolist() if similarity[i] > 0]
