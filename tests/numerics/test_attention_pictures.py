"""The attention that is drawn is the model's own, rolled out as its paper says, and its words are the text's."""

import numpy as np
import pytest
import torch
from tests.building import small_encoder
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from isotune.data.classification.labels import ClassificationSettings
from isotune.data.classification.preparation import tokenize
from isotune.data.sources.source import read_rows
from isotune.evaluation.classification.evaluate import Rows
from isotune.evaluation.classification.plots import attention_of, precision_recall, rollout, wilson, words_of
from isotune.evaluation.models import load_model_classifier


@pytest.mark.parametrize("kind", ["bert", "distilbert", "roberta"])
def test_weights_are_those_of_stock_eager_attention_and_the_model_is_left_as_it_was(tmp_path, kind):
    folder = small_encoder(tmp_path / "encoder", kind)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    model.save_pretrained(folder)
    classifier = load_model_classifier(folder, torch.device("cpu"), torch.float32)
    found = tokenize(
        read_rows("builtin:opinions", "test"),
        classifier.tokenizer,
        ClassificationSettings(64, num_labels=3),
        show_progress=False,
    )
    rows = Rows(found.documents, [], ["a", "b"], 0)
    stock = AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager").eval()
    before = classifier.model.config._attn_implementation
    attention = attention_of(classifier, rows, 5)
    assert not isinstance(attention, str)
    assert classifier.model.config._attn_implementation == before
    start, stop = found.documents.starts[5:7]
    ids = torch.tensor(found.documents.input_ids[start:stop].astype(np.int64))[None]
    with torch.no_grad():
        expected = stock(ids, attention_mask=torch.ones_like(ids), output_attentions=True).attentions
    np.testing.assert_allclose(attention.weights, torch.cat(expected).numpy(), atol=1e-6)
    assert attention.rolled.sum() == pytest.approx(1)
    assert len(attention.words) == len(attention.rolled) == attention.word_of.max() + 1


def test_rolled_out_attention_is_the_sum_over_all_paths():
    weights = np.random.default_rng(0).dirichlet(np.ones(3), size=(2, 2, 3)).astype(np.float32)
    first, second = ((layer.mean(axis=0) + np.eye(3)) / 2 for layer in weights.astype(float))
    expected = [[sum(second[i, k] * first[k, j] for k in range(3)) for j in range(3)] for i in range(3)]
    np.testing.assert_allclose(rollout(weights), expected, atol=1e-7)


@pytest.mark.parametrize("name", ["bert-base-uncased", "bert-base-cased", "opt"])
def test_words_hold_every_token_once_in_order(shared_data, name):
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "tokenizers" / name)
    ids = tokenizer("An unbelievably mind-numbing filmmaker's debut, costs $5")["input_ids"]
    words, word_of = words_of(tokenizer, ids)
    assert word_of.tolist() == sorted(word_of.tolist()) and set(word_of) == set(range(len(words)))
    plain = "".join(words).lower().replace(" ", "")
    assert "unbelievably" in [word.lower() for word in words] and "anunbelievablymind-numbingfilmmaker'sdebut" in plain


def test_the_curve_is_scikit_learns_and_the_interval_is_scipys():
    from scipy.stats import binomtest
    from sklearn.metrics import precision_recall_curve

    chance = np.random.default_rng(1)
    truth, scores = chance.random(60) < 0.4, chance.integers(0, 20, 60) / 20
    recall, precision = precision_recall(truth, scores)
    theirs = precision_recall_curve(truth, scores)
    np.testing.assert_allclose(precision[::-1], theirs[0][:-1])
    np.testing.assert_allclose(recall[::-1], theirs[1][:-1])
    low, high = wilson(np.array([0.3]), np.array([40]))
    expected = binomtest(12, 40).proportion_ci(method="wilson")
    assert (low[0], high[0]) == pytest.approx((expected.low, expected.high), abs=1e-4)
