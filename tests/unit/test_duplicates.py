"""Exact and near duplicates between training and evaluation texts, beside a plain count and exact similarities."""

import json

import numpy as np
import pytest
from tests.unit.test_labelled import word_tokenizer

from isotune.config import ClassificationRecipe
from isotune.data.classification.split import jaccard, prepare_labelled, runs_of_words
from isotune.data.documents import PreparedData
from isotune.io.errors import UserError

LONG = "It is a film about a man who walks through the snow for days and finds at last the house of his old father"


def prepare(train: str, evaluation: str, **values) -> tuple[PreparedData, PreparedData]:
    recipe = ClassificationRecipe.from_values(
        model_name_or_path="builtin:bert-tiny", dataset_name=train, eval_dataset_name=evaluation, output_dir="unused",
        **values,
    )  # fmt: skip
    data = prepare_labelled(recipe, word_tokenizer(), show=False)
    assert data.evaluation is not None
    return data.train, data.evaluation


@pytest.fixture
def write(tmp_path):
    def written(name: str, *rows: tuple[str, int]) -> str:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))
        return str(path)

    return written


def texts(folder, split: str) -> list[str]:
    return [json.loads(line)["text"] for line in (folder / f"{split}.jsonl").open(encoding="utf-8")]


def planted(text: str, kind: int) -> str:
    """A real review, changed a little or a lot."""
    words = text.split()
    middle = len(words) // 2
    return [
        " ".join([*words[:middle], "indeed", *words[middle:]]),
        " ".join(words[: max(3, len(words) * 9 // 10)]),
        " ".join(words[: max(3, middle)]),
        f"{text} {text}",
        " ".join("indeed" if n % 12 == 0 else word for n, word in enumerate(words)),
    ][kind % 5]


def test_real_reviews_in_both_sets_are_as_many_as_a_plain_count_finds(shared_data):
    folder = shared_data / "imdb"
    train, evaluation = prepare(str(folder), str(folder))
    plain = {
        split: [" ".join(text.replace("<br />", "\n").lower().split()) for text in texts(folder, split)]
        for split in ("train", "test")
    }
    here, there = set(plain["train"]), set(plain["test"])
    assert train.table.counts["in_the_other"]["exactly"] == sum(text in there for text in plain["train"]) > 0
    assert evaluation.table.counts["in_the_other"]["exactly"] == sum(text in here for text in plain["test"]) > 0
    assert train.table.counts["repeated"] == len(plain["train"]) - len(here) > 0
    printed = str(train.table)
    assert "exactly in the other data too" in printed and "with the text of an earlier one" in printed


def test_near_duplicates_are_those_of_all_pairs_computed_exactly(shared_data, write):
    from sklearn.feature_extraction.text import CountVectorizer

    reviews = texts(shared_data / "imdb", "test")
    changed = [planted(text, number) for number, text in enumerate(reviews[:400])]
    examined = [(text, number % 2) for number, text in enumerate(reviews)]
    learned = [(text, number % 2) for number, text in enumerate(changed + texts(shared_data / "imdb", "train")[:600])]
    train, evaluation = prepare(write("train", *learned), write("test", *examined))

    runs = CountVectorizer(ngram_range=(3, 3), binary=True, token_pattern=r"(?u)\w+", dtype=np.int64)
    cleaned = [text.replace("<br />", "\n").replace("\\", " ") for text, _ in learned + examined]
    counted = runs.fit_transform(cleaned)
    sizes = np.asarray(counted.sum(axis=1)).ravel()
    one, other = counted[: len(learned)], counted[len(learned) :]
    shared = (one @ other.T).toarray()
    similar = shared / (sizes[: len(learned), None] + sizes[None, len(learned) :] - shared) >= 0.8
    assert sum(train.table.counts["in_the_other"].values()) == similar.any(axis=1).sum() > 150
    assert sum(evaluation.table.counts["in_the_other"].values()) == similar.any(axis=0).sum() > 150
    assert train.table.counts["in_the_other"]["nearly"] > 100


def test_a_changed_word_is_near_and_half_a_text_is_not():
    changed, half = LONG.replace("snow", "sand"), " ".join(LONG.split()[:12])
    assert 0.7 < jaccard(runs_of_words(LONG + " " + LONG[::-1]), runs_of_words(changed + " " + LONG[::-1])) < 1
    assert jaccard(runs_of_words(LONG), runs_of_words(half)) < 0.8
    assert runs_of_words("Two words") == {"two words"} and runs_of_words(" ... ") == frozenset()


def test_leaked_texts_are_dropped_from_training_counted_and_never_from_the_evaluation(write):
    near = LONG + " " + LONG.replace("snow", "rain") + " and then he dies"
    test = write("test", ("The End.", 0), (near, 1), ("", 0))
    train = write(
        "train", ("one", 0), ("the  end.", 1), (near + " twice", 1), ("two", 1), ("", 0), ("three four five", 0)
    )
    kept, evaluation = prepare(train, test, drop_leaked=True)
    assert list(kept.texts()) == ["one", "two", "", "three four five"]
    assert kept.documents.labels.tolist() == [0, 1, 0, 0] and kept.documents.ids.tolist() == [0, 3, 4, 5]
    assert kept.table.counts["dropped"] == 2 and len(evaluation.documents) == 3
    assert "dropped, in the evaluation data too" in str(kept.table)
    all_of_it, same = prepare(train, test)
    assert all_of_it.table.counts["in_the_other"] == {"exactly": 1, "nearly": 1} and len(all_of_it.documents) == 6
    assert same.table.counts["in_the_other"] == {"exactly": 1, "nearly": 1}
    assert kept.fingerprint != all_of_it.fingerprint and same.fingerprint == evaluation.fingerprint


def test_training_data_that_all_leaked_are_refused_in_one_sentence(write):
    rows = [("one two three four", 0), ("five six seven eight", 1)]
    with pytest.raises(UserError, match=r"drop_leaked: all of .*train.jsonl stands in .*test.jsonl too: nothing is"):
        prepare(write("train", *rows), write("test", *rows), drop_leaked=True)


def test_one_text_under_two_classes_is_counted(write):
    rows = [("good", 0), ("Good", 1), ("good ", 1), ("bad", 0), ("bad", 0), ("", 0), ("", 1)]
    train, _ = prepare(write("train", *rows), write("test", ("x", 0)))
    assert train.table.counts["contradicting"] == 3 and train.table.counts["repeated"] == 3
    assert "with the text of one of another class" in str(train.table)


def test_the_comparison_is_kept_on_disk(write, monkeypatch):
    paths = write("train", ("a b c", 0), ("d", 1)), write("test", ("a b c", 0))
    first = prepare(*paths)[0].table
    monkeypatch.setattr(
        "isotune.data.classification.split.find_overlap", lambda *_, **__: pytest.fail("compared again")
    )
    assert prepare(*paths)[0].table == first
