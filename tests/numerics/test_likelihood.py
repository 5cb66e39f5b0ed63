"""The likelihood of references is that of one document after the other through the stock model."""

import math

import pytest
import torch
from tests.building import loss_of_document, small_opt
from transformers import AutoModelForCausalLM, AutoTokenizer

from isotune.data.sft.conversations import Conversation, render_prompt
from isotune.data.sft.tokenization import ConversationEncoder
from isotune.data.sources.source import read_rows
from isotune.evaluation.generation import evaluate
from isotune.evaluation.generation.evaluate import Reference, score_references
from isotune.evaluation.metrics.text import Likelihood, measure_likelihoods
from isotune.evaluation.models import GenerationModel, generation_model_named
from isotune.evaluation.tasks import eval_samples_of
from isotune.io.errors import UserError


@pytest.fixture(scope="module")
def references(shared_data) -> list[Reference]:
    """Real questions and answers of Guanaco, short enough for a small model."""
    asked = eval_samples_of(read_rows(str(shared_data / "guanaco" / "test.jsonl"), "train"))
    short = [q for q in asked if len(q.prompt) + len(q.reference) < 400]
    assert len(short) > 10
    return [Reference(q.id, render_prompt(q.prompt), " " + q.reference) for q in short[:6]]


@pytest.fixture(scope="module")
def speaker(shared_data, tmp_path_factory) -> GenerationModel:
    """A small random OPT with OPT's own tokenizer."""
    folder = tmp_path_factory.mktemp("opt")
    tokenizer = AutoTokenizer.from_pretrained(str(shared_data / "tokenizers" / "opt"))
    small_opt(folder, vocab_size=len(tokenizer), max_position_embeddings=500)
    tokenizer.save_pretrained(folder)
    return generation_model_named(str(folder))


def test_it_is_that_of_a_loop_over_documents_with_the_tokens_of_training(speaker, references):
    model = AutoModelForCausalLM.from_pretrained(speaker.model.name_or_path).eval()
    encoder = ConversationEncoder(speaker.tokenizer)
    found = score_references(speaker, references)
    assert list(found) and set(found) == {reference.row for reference in references}
    for reference in references:
        text = reference.prompt + reference.text
        encoded = encoder.encode([Conversation(text, ((len(reference.prompt), len(text)),))])
        ids = torch.tensor([*encoder.prefix, *encoded.input_ids[:-1]]).long()  # without the eos that closes it
        supervised = torch.tensor([False] * len(encoder.prefix) + encoded.supervised[:-1].tolist())
        with torch.no_grad():
            expected = loss_of_document(model, ids, supervised).item()
        one = found[reference.row]
        assert one.nll == pytest.approx(expected, rel=1e-6)
        assert (one.tokens, one.bytes) == (int(supervised.sum()), len(reference.text.encode()))
        assert one.whole


def test_how_many_documents_a_pass_holds_changes_nothing(speaker, references, monkeypatch):
    expected = score_references(speaker, references)
    for pass_tokens in (1, 300, 10_000):
        monkeypatch.setattr(evaluate, "BATCH_TOKENS", pass_tokens)
        found = score_references(speaker, references[::-1])
        for row, one in expected.items():
            assert found[row].nll == pytest.approx(one.nll, rel=1e-6)


def test_bits_a_byte_do_not_depend_on_the_tokenizer():
    per_token = Likelihood(nll=math.log(256) * 12, tokens=12, bytes=12, whole=True)
    fewer_tokens = Likelihood(nll=math.log(256) * 12, tokens=3, bytes=12, whole=True)
    first, second = measure_likelihoods([per_token, fewer_tokens])["bits_per_byte"].of_rows
    assert first == second == pytest.approx(8.0)


def test_a_reference_longer_than_the_model_is_scored_as_far_as_it_has_positions(speaker):
    long = Reference(0, "### Human: Hi\n### Assistant:", " word" * 600)
    whole = Reference(1, long.prompt, " word" * 5)
    found = score_references(speaker, [long, whole])
    prompt_tokens = speaker.token_count(long.prompt)
    assert not found[0].whole
    assert found[1].whole
    assert found[0].tokens == speaker.positions - prompt_tokens
    assert found[0].bytes == len(" word") * found[0].tokens


def test_scores_that_are_not_finite_are_counted_and_refused(speaker, monkeypatch):
    broken = generation_model_named(speaker.model.name_or_path)
    with torch.no_grad():
        broken.model.model.decoder.embed_positions.weight[60] = float("nan")
    monkeypatch.setattr(evaluate, "BATCH_TOKENS", 1)  # each reference alone: only the long one comes to that position
    prompt = "### Human: Hi\n### Assistant:"
    with pytest.raises(UserError, match="not finite for 1 of 2 references, row 4 first"):
        score_references(broken, [Reference(7, prompt, " Hello"), Reference(3, prompt, " word" * 80)])


def test_any_llama_tokenizer_is_scored_too(shared_data):
    speaker = generation_model_named(str(shared_data / "checkpoints" / "stories260K"))
    text = " there was a little girl named Lily."
    one = score_references(speaker, [Reference(0, "Once upon a time,", text)])[0]
    tokens = speaker.tokenizer("Once upon a time," + text)["input_ids"]
    prompt = speaker.tokenizer("Once upon a time,")["input_ids"]
    assert tokens[: len(prompt)] == prompt
    supervised = torch.tensor([False] * len(prompt) + [True] * (len(tokens) - len(prompt)))
    with torch.no_grad():
        expected = loss_of_document(speaker.model, torch.tensor(tokens), supervised).item()
    assert one.nll == pytest.approx(expected, rel=1e-6)
    assert one.bytes == len(text)
    assert math.exp(one.nll / one.tokens) < 6  # a trained model finds its own kind of text likely
