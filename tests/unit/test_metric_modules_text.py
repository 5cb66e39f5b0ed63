"""The local `evaluate` modules of texts load without a network and give what sacrebleu and rouge-score give."""

import math
import socket

import evaluate
import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

SAID = ["the cat sat on the mat", "hello there, my friend", "Ünïcödé 你好"]
WANTED = ["the cat sat on a mat", "hello there, my friend", "unicode 你好"]
NATS = [12.5, 3.25, 7.0]


@pytest.fixture
def load(repository, monkeypatch):
    """`evaluate.load` of a module of this repository, with the network cut."""

    def refuse(*args, **kwargs):
        raise OSError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    return lambda name: evaluate.load(str(repository / "eval" / "metrics" / "isotune"), name)


def test_bleu_and_chrf_are_sacrebleus(load):
    found = load("bleu").compute(predictions=SAID, references=WANTED)
    assert found == {"bleu": pytest.approx(sacrebleu.corpus_bleu(SAID, [WANTED]).score)}
    found = load("chrf").compute(predictions=SAID, references=WANTED)
    assert found == {"chrf": pytest.approx(sacrebleu.corpus_chrf(SAID, [WANTED]).score)}


def test_rouge_is_rouge_scores(load):
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    each = [scorer.score(wanted, said) for said, wanted in zip(SAID, WANTED, strict=True)]
    expected = {name: sum(one[name].fmeasure for one in each) / 3 for name in ("rouge1", "rouge2", "rougeL")}
    assert load("rouge").compute(predictions=SAID, references=WANTED) == pytest.approx(expected)


def test_exact_match_is_letter_for_letter(load):
    assert load("exact_match").compute(predictions=SAID, references=WANTED) == {"exact_match": pytest.approx(1 / 3)}


def test_perplexity_and_bits_a_byte_are_of_all_texts_together(load):
    found = load("perplexity").compute(predictions=NATS, references=[6, 5, 9])
    assert found == {"perplexity": pytest.approx(math.exp(sum(NATS) / 20))}
    found = load("bits_per_byte").compute(predictions=NATS, references=WANTED)
    text_bytes = sum(len(text.encode()) for text in WANTED)
    assert found == {"bits_per_byte": pytest.approx(sum(NATS) / text_bytes / math.log(2))}
    with pytest.raises(ValueError, match="at least one token"):
        load("perplexity").compute(predictions=[1.0], references=[0])
