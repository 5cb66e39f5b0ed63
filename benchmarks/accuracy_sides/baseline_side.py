"""TF-IDF and logistic regression on the same rows; n-grams and the penalty are chosen on train alone."""

from argparse import Namespace
from pathlib import Path

from accuracy_sides.material import read_texts, write_predictions

GRID = {"tfidfvectorizer__ngram_range": [(1, 1), (1, 2)], "logisticregression__C": [0.3, 1.0, 3.0, 10.0]}


def run(data: str, folder: Path, given: Namespace) -> None:
    """Fit every choice on five folds of train, the best on all of it, and predict."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline

    texts, labels = read_texts(data, "train", given)
    pipeline = make_pipeline(TfidfVectorizer(sublinear_tf=True, min_df=2), LogisticRegression(max_iter=1_000))
    search = GridSearchCV(pipeline, GRID, cv=5).fit(texts, labels)
    test_texts, test_labels = read_texts(data, "test", given)
    found = search.predict(test_texts).tolist()
    write_predictions(folder, test_labels, found, chosen={k: str(v) for k, v in search.best_params_.items()})
