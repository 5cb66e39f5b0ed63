"""Small built-in models and their tokenizer, defined in code, so that every command runs without a network."""

import random
from collections.abc import Callable
from functools import cache
from typing import Any

from transformers import BertConfig, OPTConfig, PreTrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from isotune.data.sources.source import PREFIX, find_corpus
from isotune.io.errors import UserError, nearest

TOKENIZER_ROWS = 500

_SHARED = {"max_position_embeddings": 512, "num_attention_heads": 4, "pad_token_id": 1}
_MODELS: dict[str, tuple[Callable[..., PreTrainedConfig], dict[str, Any]]] = {
    # with OPT's special tokens (pad 1, bos = eos = 2) and a head tied to the embedding
    "opt-tiny": (
        OPTConfig,
        {"hidden_size": 128, "word_embed_proj_dim": 128, "ffn_dim": 512, "num_hidden_layers": 3}
        | {"dropout": 0.0, "attention_dropout": 0.0, "bos_token_id": 2, "eos_token_id": 2},
    ),
    "bert-tiny": (BertConfig, {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}),
}


def builtin_config(name: str) -> PreTrainedConfig:
    """The configuration of a built-in model, `builtin:opt-tiny` or `builtin:bert-tiny`."""
    kind, geometry = _MODELS[_short_name(name)]
    return kind(vocab_size=len(builtin_tokenizer(name)), **_SHARED, **geometry)


@cache
def _trained_backend() -> str:
    """A byte-level BPE trained on the demo's corpora, as JSON; byte-level, so that it encodes every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    corpora = [find_corpus(name).generate(random.Random(0), TOKENIZER_ROWS) for name in ("capitals", "pirate")]
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([row["text"] for rows in corpora for row in rows], trainer)
    backend.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    return backend.to_str()


def builtin_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of the built-in models: pad 1, bos = eos = 2 and bos prepended, as OPT's.

    An encoder's texts are enclosed in `<s>` and `</s>`, as RoBERTa's are.
    """
    from tokenizers import Tokenizer, processors

    backend = Tokenizer.from_str(_trained_backend())
    special: dict[str, Any] = {"bos_token": "</s>", "eos_token": "</s>"}
    if _short_name(name) == "bert-tiny":
        enclosing = [("<s>", 0), ("</s>", 2)]
        backend.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=enclosing)
        special = {"cls_token": "<s>", "sep_token": "</s>", "model_input_names": ["input_ids", "attention_mask"]}
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", **special)


def _short_name(name: str) -> str:
    short = name.removeprefix(PREFIX)
    if short not in _MODELS:
        near = nearest(short, _MODELS)
        hint = f"did you mean '{PREFIX}{near}'?" if near else f"there are {', '.join(_MODELS)}"
        raise UserError(f"model_name_or_path '{name}' is not built in: {hint}")
    return short
