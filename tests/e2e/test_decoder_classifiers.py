"""A decoder as classifier, with the tokenizers that decoders come with: no token around a text, padding by the eos."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.building import build_classifier, small_encoder
from tokenizers import processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from isotune.checkpoint.export import export_run
from isotune.data.tokenizer import TextEncoder
from isotune.evaluation.classification.evaluate import classify
from isotune.evaluation.classification.sentences import TextReader
from isotune.evaluation.distributed_eval import Ranks
from isotune.evaluation.models import load_run_classifier
from isotune.io.errors import UserError
from isotune.models.base.builtin import builtin_tokenizer
from isotune.report.model_card import write_model_card
from isotune.serving.classification.attribution import integrated_gradients
from isotune.training.from_recipe import save

SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
SIZE |= {"max_position_embeddings": 128, "num_key_value_heads": 1, "initializer_range": 0.2}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128, "initializer_range": 0.2}
TEXTS = ["a fine meal and a slow waiter", "never again", "the old man said that we saw it"]


def tokenizer(form: str) -> PreTrainedTokenizerFast:
    """`bare`: nothing stands around a text and nothing pads; `closed`: the eos stands behind it, and it pads too."""
    backend = builtin_tokenizer("builtin:bert-tiny").backend_tokenizer
    around = "$A </s>" if form == "closed" else "$A"
    backend.post_processor = processors.TemplateProcessing(single=around, special_tokens=[("</s>", 2)])
    pad = {"pad_token": "</s>"} if form == "closed" else {}
    words = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", padding_side="left", **pad)
    words.chat_template = "{{ messages[0].content }}"  # as instruct models bring one, beside padding on the left
    return words


def base(folder: Path, kind: str, form: str) -> str:
    words = tokenizer(form)
    config = AutoConfig.for_model(kind, vocab_size=len(words) + 2, eos_token_id=2, **(GPT2 if kind == "gpt2" else SIZE))
    torch.manual_seed(4)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def alone(model, words) -> torch.Tensor:
    """Logits [texts, classes]: the head on the state of each text's last token that is no eos, by hand."""
    rows = []
    for text in TEXTS:
        ids = torch.tensor([[token for token in words(text)["input_ids"] if token != 2]])
        rows.append(model.score(model.base_model(input_ids=ids).last_hidden_state[0, -1]))
    return torch.stack(rows)


CASES = [("gpt2", "bare", "lora"), ("qwen2", "closed", "full")]
SLOW = [("gpt2", "bare", "full"), ("qwen2", "closed", "lora")]


@pytest.mark.parametrize(
    ("kind", "form", "tune"), [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_what_is_saved_evaluated_and_exported_reads_the_token_that_training_read(tmp_path, kind, form, tune):
    values = {"model_name_or_path": base(tmp_path / "base", kind, form), "max_steps": 2, "save_steps": 2, "tune": tune}
    values |= {"max_seq_length": 64, "eval_dataset_name": None, "learning_rate": 1e-2}
    built = build_classifier(tmp_path, **values)
    built.trainer.train()
    save(built.start, built.trainer)
    run = built.run.path
    card = write_model_card(run).read_text()
    scope: dict = {}
    exec(card.split("```python\n")[1].split("```")[0], scope)  # what its reader would run
    trained = scope["model"].eval()
    if tune == "lora":
        assert trained.get_base_model().config.pad_token_id == (2 if form == "closed" else None)
        trained = trained.merge_and_unload()
    expected = alone(trained, scope["tokenizer"])
    classifier = load_run_classifier(run, torch.device("cpu"), torch.float32)
    documents = TextReader(classifier).documents([TEXTS])
    for model in (classifier.model, built.trainer.model.eval()):
        logits = classify(replace(classifier, model=model), documents, Ranks(0, 1, torch.device("cpu")))
        assert np.allclose(logits, expected, atol=1e-5)
    shown = integrated_gradients(classifier, TextReader(classifier).documents([TEXTS[:1]]), 1)  # what a server explains
    assert shown.words and abs(shown.output - float(expected.softmax(-1)[0, 1])) < 1e-5
    for source in (run, run / "checkpoints" / "step-00000002"):
        folder = export_run(source, merge=True, output=tmp_path / f"out-{source.name}").folder
        model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        words = AutoTokenizer.from_pretrained(folder)
        assert words.padding_side == "right" and words.chat_template is None
        if form == "closed":  # plain transformers takes a batch
            assert model.config.pad_token_id == 2
            batch = words(TEXTS, padding=True, return_tensors="pt")
            with torch.no_grad():
                assert torch.allclose(model(**batch).logits, expected, atol=1e-5)
        assert torch.allclose(alone(model, words), expected, atol=1e-5)


def test_an_empty_text_is_one_eos_and_counted_as_empty():
    encoder = TextEncoder(tokenizer("bare"))
    documents = encoder.encode(["", "a fine meal", ""], 16, "head")
    assert documents.lengths.tolist()[::2] == [1, 1] and documents.input_ids[[0, -1]].tolist() == [2, 2]
    assert documents.columns["whole_lengths"].tolist() == [0, documents.lengths[1], 0]
    words = tokenizer("bare")
    words.eos_token = None
    with pytest.raises(UserError, match=r"a text is empty, and the tokenizer .* has neither special tokens"):
        TextEncoder(words).encode([""], 16, "head")


def test_a_head_that_reads_the_first_token_gets_the_special_one_before_a_text(tmp_path):
    folder = small_encoder(tmp_path / "base", "bert")
    tokenizer("bare").save_pretrained(folder)
    with pytest.raises(UserError, match="puts no special token before a text, and the head of model type 'bert'"):
        build_classifier(tmp_path, model_name_or_path=folder, eval_dataset_name=None)
