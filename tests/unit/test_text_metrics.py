"""Text metrics are those of the libraries that everybody compares with, and the rest is what a plain count gives."""

import math

import numpy as np
import pytest
import sacrebleu
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from isotune.evaluation.metrics.text import Likelihood, TextMetric, measure_likelihoods, measure_texts, signatures
from isotune.evaluation.statistics.resampling import bootstrap_draws, draw_weights, values

TEXTS = ["the cat sat on the mat", "", "Arr, Paris be the capital, matey!", "a b a b a b a b", "Ünïcödé 你好 ..."]
REFERENCES = ["the cat sat on a mat", "something", "Arr, Paris be the capital, matey!", "a b c d e f g", "unicode 你好"]

words = st.lists(st.sampled_from(["the", "cat", "sat", "mat", "Paris", "être", "你好", ",", "!", "a"]), max_size=12)
texts = words.map(" ".join).map(str.strip)


def value(metric: TextMetric) -> float:
    (found,) = values([metric.of_all]).values()
    return found


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(texts, texts.filter(bool)), min_size=1, max_size=6))
@example([("she walks home", "she walked home")])  # with stemming they would be the same
def test_bleu_chrf_and_rouge_are_the_libraries_own(pairs):
    said, wanted = [list(side) for side in zip(*pairs, strict=True)]
    found = measure_texts(said, wanted, [True] * len(said))
    assert value(found["bleu"]) == pytest.approx(sacrebleu.corpus_bleu(said, [wanted]).score, abs=1e-9)
    assert value(found["chrf"]) == pytest.approx(sacrebleu.corpus_chrf(said, [wanted]).score, abs=1e-9)
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    for name in ("rouge1", "rouge2", "rougeL"):
        each = [scorer.score(reference, text)[name].fmeasure for text, reference in pairs]
        assert found[name].of_rows.tolist() == each
        assert value(found[name]) == pytest.approx(sum(each) / len(each), abs=1e-12)
    for row, (text, reference) in enumerate(pairs):
        sentence = sacrebleu.sentence_bleu(text, [reference]).score
        assert found["bleu"].of_rows[row] == pytest.approx(sentence, abs=1e-9)
        assert found["chrf"].of_rows[row] == pytest.approx(sacrebleu.sentence_chrf(text, [reference]).score, abs=1e-9)


def test_the_rest_is_what_counting_by_hand_gives():
    found = measure_texts(TEXTS, REFERENCES, [True, True, False, False, True])
    assert found["exact_match"].of_rows.tolist() == [0, 0, 1, 0, 0]
    assert found["empty"].of_rows.tolist() == [0, 1, 0, 0, 0]
    assert value(found["ended"]) == 3 / 5
    assert found["distinct_1"].of_rows.tolist() == [5 / 6, 0, 1, 2 / 8, 1]
    assert found["distinct_2"].of_rows.tolist() == [1, 0, 1, 2 / 7, 1]
    assert found["repetition"].of_rows.tolist() == [0, 0, 0, pytest.approx(1 - 2 / 5), 0]
    assert value(found["length_ratio"]) == sum(map(len, TEXTS)) / sum(map(len, REFERENCES))


def test_perplexity_and_bits_a_byte_are_of_all_tokens_and_bytes_and_not_means_of_rows():
    found = measure_likelihoods([Likelihood(3.0, 2, 8, True), Likelihood(5.0, 10, 12, True)])
    assert value(found["perplexity"]) == pytest.approx(math.exp(8 / 12))
    assert value(found["bits_per_byte"]) == pytest.approx(8 / 20 / math.log(2))
    assert value(found["nll"]) == 4.0
    assert found["perplexity"].of_rows.tolist() == pytest.approx([math.exp(1.5), math.exp(0.5)])


def test_a_resampled_score_is_the_libraries_score_of_the_resampled_rows():
    chance = np.random.default_rng(0)
    rows = 40
    said = [" ".join(chance.choice(["a", "b", "c", "d"], 8)) for _ in range(rows)]
    wanted = [" ".join(chance.choice(["a", "b", "c", "d"], 8)) for _ in range(rows)]
    found = measure_texts(said, wanted, [True] * rows)
    weights = np.concatenate(list(draw_weights(rows, resamples=50, seed=0)))
    scores: dict[str, list[float]] = {"bleu": [], "chrf": []}
    for drawn in weights:
        picked = [row for row in range(rows) for _ in range(drawn[row])]
        assert len(picked) == rows
        some, others = [said[i] for i in picked], [wanted[i] for i in picked]
        scores["bleu"].append(sacrebleu.corpus_bleu(some, [others]).score)
        scores["chrf"].append(sacrebleu.corpus_chrf(some, [others]).score)
    statistics = [found[name].of_all for name in scores]
    for name, draws in bootstrap_draws(statistics, rows, resamples=50, seed=0).items():
        assert draws.tolist() == pytest.approx(scores[name], abs=1e-9)


def test_how_bleu_and_chrf_were_computed_is_said_in_sacrebleus_words():
    assert set(signatures()) == {"bleu", "chrf"}
    assert all(f"version:{sacrebleu.__version__}" in said for said in signatures().values())
