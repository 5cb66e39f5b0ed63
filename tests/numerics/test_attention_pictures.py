"""The attention that is drawn is the model's own, rolled out as its paper says, and its words are the text's."""

import numpy as np
import pytest
import torch
from tests.building import small_encoder
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from isotune.data.classification.labels import ClassificationSettings
from isotune.data.classification.preparation import tokenize
from isotune.data.documents import Documents
from isotune.data.sources.source import read_rows
from isotune.evaluation.classification import attention_plots, plots
from isotune.evaluation.classification.attention_plots import (
    Attention,
    attention_of,
    draw_attention,
    rollout,
    words_of,
)
from isotune.evaluation.classification.evaluate import Evaluation, Rows
from isotune.evaluation.classification.plots import draw_plots, precision_recall, wilson
from isotune.evaluation.models import load_model_classifier
from isotune.evaluation.statistics.resampling import Scores


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
    words, word_of = words_of(classifier.tokenizer, ids[0].tolist())
    assert attention.words == words and len(attention.rolled) == word_of.max() + 1
    assert attention.special.tolist() == [word in classifier.tokenizer.all_special_tokens for word in words]


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


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, by the name of their file, with their alternative texts."""
    found = {}
    for module in (plots, attention_plots):
        monkeypatch.setattr(module, "save_plot", lambda figure, file, lines: found.update({file.stem: (figure, lines)}))
    return found


def evaluation_of(labels, outputs, lengths=None, **rows):
    """An evaluation of texts of `lengths` tokens."""
    count = len(labels)
    lengths = np.full(count, 4) if lengths is None else np.array(lengths)
    starts, numbers = np.append(0, np.cumsum(lengths)), np.arange(count)
    ids = np.zeros(lengths.sum(), np.int32)
    documents = Documents(ids, np.array(labels, np.int32), starts, numbers, {"ids": numbers})
    names = [f"class {k}" for k in range(np.shape(outputs)[1])]
    return Evaluation(Rows(documents, [f"text {k}" for k in range(count)], names, 0, **rows), outputs, Scores({}, {}))


def test_the_precision_recall_curve_begins_at_recall_0_with_the_area_that_it_says(figures, tmp_path):
    chance = np.random.default_rng(2)
    labels = chance.integers(0, 2, 50)
    sure = np.clip(0.5 + 0.3 * (labels - 0.5) + chance.normal(0, 0.2, 50), 0, 1).round(1)  # many rows share the first
    draw_plots(evaluation_of(labels, np.stack([1 - sure, sure], axis=1)), tmp_path)
    figure, lines = figures["precision_recall"]
    curve = figure.axes[0].get_lines()[0]
    recall, precision = np.array(curve.get_xdata()), np.array(curve.get_ydata())
    assert recall[0] == 0 and precision[0] == precision[1] and recall[1] > 0
    assert f"average precision {np.diff(recall) @ precision[1:]:.3f}" in lines[1]


@pytest.mark.parametrize(("classes", "are_named", "has_counts"), [(3, 3, True), (20, 20, True), (60, 60, False)])
def test_a_confusion_matrix_names_its_classes_and_counts_where_that_is_readable(
    figures, tmp_path, classes, are_named, has_counts
):
    labels = np.arange(300) % classes
    outputs = np.eye(classes)[(labels + (np.arange(300) % 7 == 0)) % classes]
    draw_plots(evaluation_of(labels, outputs), tmp_path)
    panel = figures["confusion_matrix"][0].axes[0]
    assert len(panel.get_yticklabels()) == len(panel.get_xticklabels()) == are_named
    assert bool(panel.texts) == has_counts
    assert all(text.get_fontsize() >= 4.5 for text in (*panel.texts, *panel.get_yticklabels()))


def of_attention(count: int, heads: int) -> Attention:
    """Of one layer, from [CLS] to [SEP]."""
    weights = np.random.default_rng(0).dirichlet(np.ones(count), size=(1, heads, count)).astype(np.float32)
    tokens, special = ["[CLS]", *[f"t{k}" for k in range(count - 2)], "[SEP]"], np.zeros(count, bool)
    special[[0, -1]] = True
    return Attention(tokens, tokens, weights, rollout(weights)[0], special)


def test_the_title_of_a_drawing_says_what_is_predicted_by_the_label_thresholds(figures, tmp_path, monkeypatch):
    monkeypatch.setattr(attention_plots, "attention_of", lambda *_: of_attention(4, 1))
    labels, outputs = np.array([[1, 0]]), np.array([[0.7, 0.6]])
    evaluation = evaluation_of(labels, outputs, task_type="multi_label", thresholds=np.array([0.5, 0.9]))
    draw_attention(None, evaluation, tmp_path)
    _, lines = figures["attention_words_0"]
    assert "actual class 0, predicted class 0." in lines[0]


def test_words_are_shaded_relative_to_the_largest_word_and_special_tokens_are_not(figures, tmp_path, monkeypatch):
    attention = of_attention(6, 1)
    attention.rolled[:] = [0.6, 0.05, 0.1, 0.05, 0.0, 0.2]
    monkeypatch.setattr(attention_plots, "attention_of", lambda *_: attention)
    draw_attention(None, evaluation_of([0], np.array([[0.2, 0.8]])), tmp_path)
    figure, lines = figures["attention_words_0"]
    shades = [text.get_bbox_patch().get_alpha() for text in figure.axes[0].texts]
    assert shades == pytest.approx([0, 0.425, 0.85, 0.425, 0, 0])
    assert lines[1:] == ["Largest: t1 10.0%, t0 5.0%, t2 5.0%, t3 0.0%.", "Special tokens: 80.0%."]


@pytest.mark.parametrize(("count", "heads", "named"), [(6, 2, True), (40, 12, False)])
def test_heads_have_a_colour_bar_and_tokens_on_both_axes_where_they_are_readable(
    figures, tmp_path, monkeypatch, count, heads, named
):
    attention = of_attention(count, heads)
    monkeypatch.setattr(attention_plots, "attention_of", lambda *_: attention)
    draw_attention(None, evaluation_of([0], np.array([[0.2, 0.8]]), [count]), tmp_path)
    *panels, bar = figures["attention_heads_0"][0].axes
    assert bar.get_ylabel() == "weight" and len(panels) == heads
    expected = attention.tokens if named else []
    assert [text.get_text() for text in panels[0].get_yticklabels()] == expected
    assert [text.get_text() for text in panels[-1].get_xticklabels()] == expected


def test_nothing_is_drawn_of_long_texts_unless_they_are_chosen_and_a_line_says_so(
    figures, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(attention_plots, "attention_of", lambda *_: of_attention(41, 1))
    evaluation = evaluation_of([0], np.array([[0.2, 0.8]]), [41])
    draw_attention(None, evaluation, tmp_path)
    assert not figures and "every text has over 40 tokens" in capsys.readouterr().out
    draw_attention(None, evaluation, tmp_path, [0])
    assert len(figures) == 2
