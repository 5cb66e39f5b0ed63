"""What is learnt of templates with {% generation %} is what TRL's own `assistant_only_loss` learns, token by token."""

from pathlib import Path

import pytest
import trl
from datasets import Dataset
from tests.chat_tokenizers import TEMPLATES, byte_chat_tokenizer
from transformers import OPTConfig, OPTForCausalLM

from isotune.data.sft.messages import example_of
from isotune.data.sft.tokenization import ConversationEncoder

OF_TRL = Path(trl.__file__).parent / "chat_templates"
FAMILIES = ["qwen3_training", "qwen2_5_training", "llama3_training", "gemma_training", "phi3_training"]
TALKS = [
    [("user", "Hi 🙂"), ("assistant", "Hello.")],
    [("user", "One?"), ("assistant", "1"), ("user", "Two?\n"), ("assistant", "It is 2.")],
    [("user", "user"), ("assistant", "assistant\nuser")],
]  # fmt: skip


@pytest.mark.parametrize("family", [*FAMILIES, "chatml_generation"])
def test_the_supervised_tokens_are_those_of_trl(family, tmp_path):
    tokenizer = byte_chat_tokenizer(merges=True)
    folder = OF_TRL if family in FAMILIES else TEMPLATES
    tokenizer.chat_template = (folder / f"{family}.jinja").read_text("utf-8")
    rows = [[{"role": role, "content": content} for role, content in talk] for talk in TALKS]
    geometry = {
        "hidden_size": 8,
        "word_embed_proj_dim": 8,
        "ffn_dim": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    config = OPTConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **geometry)
    arguments = trl.SFTConfig(
        str(tmp_path), assistant_only_loss=True, report_to="none", use_cpu=True, bf16=False, max_length=None,
        loss_type="nll",
    )  # fmt: skip
    data = Dataset.from_dict({"messages": rows})
    theirs = trl.SFTTrainer(OPTForCausalLM(config), arguments, train_dataset=data, processing_class=tokenizer)
    expected = theirs.train_dataset
    encoder = ConversationEncoder(tokenizer)
    documents = encoder.encode([found for row in rows for found in encoder.conversations(example_of(row))])
    assert documents.input_ids.tolist() == [token for row in expected["input_ids"] for token in row]
    learnt = [label != -100 for row in expected["labels"] for label in row]
    assert documents.supervised.tolist() == learnt
    assert int(documents.supervised.sum()) == sum(learnt)
