"""Whoever generates with what is saved, merged or exported stops where an answer of the training ends."""

import pytest
from tests.chat_tokenizers import TEMPLATES, byte_chat_tokenizer
from tests.unit.test_conversation_forms import EXCHANGE, prepared
from transformers import OPTConfig, OPTForCausalLM

from isotune.data.sft.tokenization import ConversationEncoder
from isotune.evaluation.models import GenerationModel
from isotune.models.base.builtin import builtin_tokenizer
from isotune.models.base.vocabulary import add_tokens
from isotune.models.finished_run import settle

SIZE = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("template", "named", "expected"),
    [
        (None, 7, [7, "<eos>"]),  # Guanaco's form ends an answer with the tokenizer's eos
        (None, None, ["<eos>"]),
        (None, [7, 1], [7, "<eos>"]),
        ("chatml", 7, [7, "<eos>", "<|im_end|>"]),
        ("llama3", [7, 1], [7, "<eos>", "<|eot_id|>"]),
    ],
)
def test_generation_ends_where_answers_do_and_where_the_base_did(template, named, expected):
    tokenizer = byte_chat_tokenizer(template)
    model = OPTForCausalLM(OPTConfig(**SIZE, vocab_size=len(tokenizer)))
    model.generation_config.eos_token_id = named
    ids = [token if isinstance(token, int) else tokenizer.convert_tokens_to_ids(token) for token in expected]
    assert GenerationModel(model, tokenizer).eos_ids == set(ids)  # what an evaluation stops at, before it is saved
    for _ in range(2):
        settle(model, tokenizer)
        assert model.generation_config.eos_token_id == ids


CHATML = str(TEMPLATES / "chatml.jinja")


@pytest.mark.parametrize("added", [[], ["<|im_start|>", "<|im_end|>"], ["<|im_start|>"]])
def test_an_answer_ends_with_a_token_that_was_added_and_else_it_is_said(tmp_path, added):
    tokenizer = builtin_tokenizer("builtin:opt-tiny")
    add_tokens(tokenizer, added)
    tokenizer.add_tokens("\n")  # as Gemma has line ends, which end no answer
    ends = "<|im_end|>" in added
    assert ConversationEncoder(tokenizer, CHATML).end_ids == ({len(tokenizer) - 2} if ends else set())
    for chat_format, is_said in ((CHATML, not ends), ("guanaco", False)):
        notes = prepared(tmp_path, [{"text": EXCHANGE}], tokenizer, chat_format=chat_format).table.as_dict()["notes"]
        said = [note for note in notes if "ends an answer with '<|im_end|>\\n'" in note and "add_tokens" in note]
        assert bool(said) == is_said, notes
    plain = prepared(tmp_path, [{"text": EXCHANGE}], tokenizer, chat_format=CHATML, train_on="everything")
    assert plain.table.as_dict()["notes"] == []
