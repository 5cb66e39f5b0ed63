"""What is served together is what each request gets alone: probabilities to rounding, greedy answers to the letter."""

import time
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from tests.building import small_encoder, small_opt
from transformers import AutoModelForSequenceClassification

from isotune.evaluation.generation.chat import answer
from isotune.evaluation.generation.completion import Decoding
from isotune.evaluation.models import GenerationModel, generation_model_named, load_model_classifier
from isotune.models.base.builtin import builtin_tokenizer
from isotune.serving.classification.attribution import integrated_gradients
from isotune.serving.classification.service import ClassifierService, ToPredict
from isotune.serving.generation.answer_text import AnswerText
from isotune.serving.generation.service import NEARLY, GeneratorService
from isotune.serving.limits import Refused
from isotune.serving.worker import Job

QUESTIONS = [
    "Hi",
    "Greet Ada in German.",
    "What is 2 + 2, and why is it so?",
    "The " * 30,
    "Bonjour, où est la gare? 你好",
]


def job_of(work, on_piece=None):
    return Job(work, time.monotonic() + 300, on_piece)


def served_together(service, works):
    """The results of works that one forward or one batch answers, and the pieces of each."""
    pieces = [[] for _ in works]
    jobs = [job_of(work, pieces[number].append) for number, work in enumerate(works)]
    assert service.group(jobs) == jobs
    service.run(jobs)
    return [job.result.result(0) for job in jobs], ["".join(own) for own in pieces]


# classification


@pytest.fixture(scope="module", params=["bert", pytest.param("distilbert", marks=pytest.mark.slow), "modernbert"])
def classifier(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    small_encoder(folder, request.param)
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    model.save_pretrained(folder)
    return load_model_classifier(str(folder), torch.device("cpu"), torch.float32)


def test_texts_of_many_requests_in_one_forward_have_the_probabilities_that_the_stock_model_gives_each(classifier):
    service = ClassifierService(classifier)
    texts = ["good", "The phone was dreadful. " * 6, "a", "", "I liked it, and the staff too.", "good"]
    requests = [texts[:2], texts[2:3], texts[3:]]
    results, _ = served_together(service, [ToPredict(service.prepare(own, None)) for own in requests])
    assert [len(own) for own in results] == [2, 1, 3]
    stock = AutoModelForSequenceClassification.from_pretrained(classifier.name).eval()
    for text, together in zip(texts, np.concatenate(results), strict=True):
        inputs = classifier.tokenizer(text, truncation=True, max_length=classifier.settings.max_seq_length)
        with torch.no_grad():
            alone = stock(input_ids=torch.tensor([inputs["input_ids"]])).logits.double().softmax(-1)[0].numpy()
        assert np.abs(together - alone).max() < 1e-6


def test_shares_of_words_are_what_a_fine_sum_of_the_stock_model_s_slopes_gives(classifier):
    service = ClassifierService(classifier)
    (documents,) = service.prepare(["The staff was wonderful, the rest was dull."], None)
    found = integrated_gradients(classifier, documents, 1)
    stock = AutoModelForSequenceClassification.from_pretrained(classifier.name).eval()
    ids = torch.tensor(documents.input_ids.astype(np.int64))
    special = torch.tensor([int(token) in classifier.tokenizer.all_special_ids for token in ids])
    embed = stock.get_input_embeddings()
    end = embed(ids).detach()
    start = embed(torch.where(special, ids, classifier.tokenizer.pad_token_id)).detach()
    total = torch.zeros_like(end)
    steps = 400
    for step in range(steps):  # the middle of each of 400 equal parts of the way
        point = (start + (step + 0.5) / steps * (end - start)).requires_grad_()
        value = stock(inputs_embeds=point[None], attention_mask=torch.ones(1, len(ids))).logits.softmax(-1)[0, 1]
        total += torch.autograd.grad(value, point)[0] / steps
    by_token = ((end - start) * total).sum(-1)
    assert sum(found.shares) == pytest.approx(float(by_token[~special].sum()), abs=2e-5)
    assert abs(found.rest) < 2e-5
    assert found.output - found.blank_output == pytest.approx(float(by_token.sum()), abs=2e-5)
    words = "".join(found.words)
    assert "wonderful" in words.lower() and not set(classifier.tokenizer.all_special_tokens) & set(found.words)


def test_a_pair_is_refused_by_a_model_of_single_texts(classifier):
    with pytest.raises(Refused, match="this model reads one text"):
        ClassifierService(classifier).prepare(["a"], ["b"])


# generation


@pytest.fixture(scope="module", params=["opt", "stories260K"])
def speaker(request, tmp_path_factory) -> GenerationModel:
    if request.param == "stories260K":
        shared_data = request.getfixturevalue("shared_data")
        return generation_model_named(str(shared_data / "checkpoints" / "stories260K"))
    folder = tmp_path_factory.mktemp(request.param)
    small_opt(folder, max_position_embeddings=160, word_embed_proj_dim=16, init_std=0.3)
    return generation_model_named(str(folder))


def asked(service, question, tokens=24):
    return service.prepare_chat([{"role": "user", "content": question}], Decoding(max_new_tokens=tokens))


def test_greedy_answers_together_are_those_alone_and_their_pieces_add_up(speaker):
    service = GeneratorService(speaker)
    results, pieces = served_together(service, [asked(service, q, 8 + 4 * n) for n, q in enumerate(QUESTIONS)])
    for number, (question, result) in enumerate(zip(QUESTIONS, results, strict=True)):
        assert result.text == answer(speaker, question, Decoding(max_new_tokens=8 + 4 * number))
        assert pieces[number] == result.text
        assert result.prompt_tokens == speaker.token_count(
            speaker.encoder.prompt([{"role": "user", "content": question}])
        )
        assert result.tokens <= 8 + 4 * number and (result.finish == "length") == (result.tokens == 8 + 4 * number)


def test_what_a_batch_rounds_otherwise_changes_no_answer(speaker, monkeypatch):
    """A batch whose scores are off by nearly half of what is nearly the same, which real rounding is far from."""
    nearly, noise = 0.02, torch.Generator().manual_seed(0)
    monkeypatch.setitem(NEARLY, torch.float32, nearly)

    def spoil(module, arguments, output):
        if len(output.logits) > 1:
            drawn = 2 * torch.rand(output.logits.shape, generator=noise) - 1
            output.logits += 0.45 * nearly * output.logits.abs().amax(-1, keepdim=True) * drawn
        return output

    service = GeneratorService(speaker)
    hook = speaker.model.register_forward_hook(spoil)
    try:
        results, pieces = served_together(service, [asked(service, question) for question in QUESTIONS])
    finally:
        hook.remove()
    alone = [answer(speaker, question, Decoding(max_new_tokens=24)) for question in QUESTIONS]
    assert service.alone > 0 and [result.text for result in results] == pieces == alone


def test_a_batch_changes_scores_by_a_tenth_of_what_is_nearly_the_same_at_most(speaker):
    encoded = [speaker.encoder.prompt_tokens(text) for text in QUESTIONS]
    width = max(map(len, encoded))
    pad = min(speaker.eos_ids)
    ids = torch.tensor([[pad] * (width - len(own)) + own for own in encoded])
    mask = torch.tensor([[0] * (width - len(own)) + [1] * len(own) for own in encoded])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        together = speaker.model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, -1]
        for own, row in zip(encoded, together, strict=True):
            alone = speaker.model(input_ids=torch.tensor([own])).logits[0, -1]
            assert float((row - alone).abs().max()) <= NEARLY[torch.float32] / 10 * float(alone.abs().max())


def test_a_sampled_answer_is_that_of_the_same_seed_alone(speaker):
    service = GeneratorService(speaker)
    drawn = Decoding(max_new_tokens=12, temperature=1.5, seed=7)
    works = [service.prepare_chat([{"role": "user", "content": "Hi"}], drawn) for _ in range(2)]
    jobs = [job_of(work) for work in works]
    assert service.group(jobs) == jobs[:1]
    service.run(jobs[:1])
    assert jobs[0].result.result(0).text == answer(speaker, "Hi", drawn)


def test_a_stop_word_ends_an_answer_before_it_in_the_pieces_too(speaker):
    service = GeneratorService(speaker)
    (whole,), _ = served_together(service, [asked(service, "Hi")])
    word = whole.text[len(whole.text) // 2 :][:3]
    stopping = service.prepare_chat([{"role": "user", "content": "Hi"}], Decoding(max_new_tokens=24), (word,))
    (result,), (pieces,) = served_together(service, [stopping])
    assert result.text == whole.text[: whole.text.index(word)].rstrip() == pieces
    assert result.finish == "stop" and result.tokens < whole.tokens


def test_an_answer_ends_when_its_client_has_left(speaker):
    service = GeneratorService(speaker)
    job = job_of(asked(service, "Hi", 60))
    told = []
    job.on_piece = lambda piece: (told.append(piece), job.leave())
    other = job_of(asked(service, "Hi", 10))
    assert job.result.set_running_or_notify_cancel()
    service.run([job, other])
    assert len(told) == 1 and other.result.result(0).text
    assert isinstance(job.result.exception(0), Refused)


@dataclass
class Spoken:
    """A model in so far as the text of an answer needs it: its tokens are characters."""

    template: object = None

    @property
    def encoder(self):
        return self

    @property
    def tokenizer(self):
        return self

    def decode(self, tokens, **options):
        return bytes(tokens).decode(errors="replace")

    def answer_in(self, text, prompt):
        from isotune.data.sft.tokenization import ConversationEncoder

        return ConversationEncoder.answer_in(self, text, prompt)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("template", "prompt", "said", "kept"),
    [
        (None, "### Human: a\n### Assistant:", " Yes. It is 5 °C 🙂.\n### Human: And?", "Yes. It is 5 °C 🙂."),
        (None, "### Human: a\n### Assistant:", " # A\n## B\n#### Human: no\n", "# A\n## B\n#### Human: no"),
        (None, "### Human: a\n### Assistant:", " <think>\nHm.\n</think>\n\nYes.", "Yes."),
        (None, "### Human: a\n### Assistant:", " <b>Yes</b>", "<b>Yes</b>"),
        (object(), "<|user|>a<|assistant|>", "\nYes ### Human: kept\n", "Yes ### Human: kept"),
        (object(), "<|user|>a<|assistant|><think>\n", "Hm.\n</think>\n\nYes.", "Yes."),
        (object(), "<|user|>a<|assistant|>", "<think>Hm.</think> Yes.", "Yes."),
        (object(), "<|user|>a<|assistant|><think>\n", "Hm, for ever", "Hm, for ever"),
        (object(), "<|user|>a<|assistant|>", "It ends by </think> then.", "It ends by </think> then."),
        (None, None, " as it\n stands ### Human: x ", " as it\n stands ### Human: x "),
    ],
)  # fmt: skip
def test_pieces_of_an_answer_byte_by_byte_add_up_to_the_answer_at_once(template, prompt, said, kept):
    text = AnswerText(Spoken(template), prompt=prompt)  # type: ignore[arg-type]
    pieces = [text.add(byte)[0] for byte in said.encode()]
    rest, whole = text.finish()
    assert "".join([*pieces, rest]) == whole == kept
    assert len([piece for piece in pieces if piece]) > 2 or kept.startswith("Hm")


def test_the_built_in_tokenizer_s_pieces_add_up_too():
    tokenizer = builtin_tokenizer("builtin:opt-tiny")
    said = " Grüße, Ada! 你好 🙂 and so on"
    text = AnswerText(GenerationModel(None, tokenizer), prompt="### Human: a\n### Assistant:")
    pieces = [text.add(token)[0] for token in tokenizer(said, add_special_tokens=False)["input_ids"]]
    rest, whole = text.finish()
    assert "".join([*pieces, rest]) == whole == said.strip()
