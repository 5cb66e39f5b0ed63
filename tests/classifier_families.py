"""Tiny classifiers of the architectures that people fine-tune, and how each is given its documents."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

VOCABULARY, WINDOW = 300, 16
SIZE: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
SIZE |= {"vocab_size": VOCABULARY, "max_position_embeddings": 256}
GROUPED = SIZE | {"num_key_value_heads": 2, "head_dim": 8}
ROBERTA = SIZE | {"pad_token_id": 1}
TOKENS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MODERNBERT = SIZE | TOKENS | {"local_attention": WINDOW, "global_attn_every_n_layers": 2}
MODERNBERT |= {"cls_token_id": 1, "sep_token_id": 2}
DEBERTA = SIZE | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 0}
BIGBIRD = SIZE | {"block_size": 4, "num_random_blocks": 1}
DISTILBERT = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "vocab_size": VOCABULARY}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "vocab_size": VOCABULARY}
BLOOM = {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY}
OPT = {"hidden_size": 32, "word_embed_proj_dim": 16, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
OPT |= {"vocab_size": VOCABULARY, "max_position_embeddings": 256}


@dataclass(frozen=True)
class Family:
    """An architecture."""

    name: str  # as people say it
    kind: str  # the model type
    config: dict[str, Any]
    layout: str  # packed, padded or alone
    reads: str  # which states of a document its head reads: first, last or all
    fast: bool = False  # tested by `make test`

    def build(self, seed: int = 0, *, dropout: float | None = None) -> Any:
        """A classifier of three classes with weights so large that every leak shows; `dropout` is that of all kinds."""
        config = AutoConfig.for_model(self.kind, num_labels=3, **self.config)
        for key, value in config.to_dict().items():
            if dropout is not None and ("drop" in key) and isinstance(value, float):
                setattr(config, key, dropout)
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_config(config)
        for parameter in model.parameters():
            parameter.data += torch.randn_like(parameter) * (0.1 if parameter.ndim < 2 else parameter.shape[-1] ** -0.5)
        return model


FAMILIES = (
    Family("BERT", "bert", SIZE, "packed", "first"),
    Family("RoBERTa", "roberta", ROBERTA, "packed", "first", fast=True),
    Family("DistilBERT", "distilbert", DISTILBERT, "packed", "first"),
    Family("ALBERT", "albert", SIZE | {"embedding_size": 16}, "packed", "first"),
    Family("ELECTRA", "electra", SIZE | {"embedding_size": 16}, "packed", "first", fast=True),
    Family("XLM-R", "xlm-roberta", ROBERTA, "packed", "first"),
    Family("CamemBERT", "camembert", ROBERTA, "packed", "first"),
    Family("data2vec", "data2vec-text", ROBERTA, "packed", "first"),
    Family("ERNIE", "ernie", SIZE, "packed", "first"),
    Family("ModernBERT, first token", "modernbert", MODERNBERT, "packed", "first"),
    Family("ModernBERT, mean", "modernbert", MODERNBERT | {"classifier_pooling": "mean"}, "packed", "all", fast=True),
    Family("EuroBERT", "eurobert", GROUPED | TOKENS | {"mask_token_id": 3}, "packed", "all"),
    Family("GTE", "gte", SIZE | {"pad_token_id": 0}, "packed", "first", fast=True),
    Family("Nomic BERT", "nomic_bert", SIZE | {"pad_token_id": 0}, "packed", "first"),
    Family("Jina embeddings v3", "jina_embeddings_v3", ROBERTA, "packed", "first"),
    Family("MPNet", "mpnet", ROBERTA, "padded", "first"),
    Family("DeBERTa", "deberta", DEBERTA, "padded", "first"),
    Family(
        "DeBERTa-v2, v3",
        "deberta-v2",
        DEBERTA
        | {"position_buckets": 8, "norm_rel_ebd": "layer_norm", "share_att_key": True, "position_biased_input": False},
        "padded",
        "first",
        fast=True,
    ),
    Family("Longformer", "longformer", ROBERTA | {"attention_window": [WINDOW, WINDOW]}, "padded", "first"),
    Family("RemBERT", "rembert", SIZE, "padded", "first"),
    Family("RoFormer", "roformer", SIZE, "padded", "first"),
    Family(
        "BigBird, block sparse", "big_bird", SIZE | {"block_size": 4, "num_random_blocks": 1}, "alone", "first", True
    ),
    Family("BigBird, full", "big_bird", BIGBIRD | {"attention_type": "original_full"}, "padded", "first"),
    Family("ConvBERT", "convbert", SIZE, "alone", "first"),
    Family("FNet", "fnet", {k: v for k, v in SIZE.items() if k != "num_attention_heads"}, "alone", "first"),
    Family("GPT-2", "gpt2", GPT2 | {"bos_token_id": 2, "eos_token_id": 2}, "packed", "last", fast=True),
    Family("OPT", "opt", OPT, "packed", "last", fast=True),
    Family("Llama", "llama", GROUPED, "packed", "last"),
    Family("Mistral, sliding window", "mistral", GROUPED | {"sliding_window": WINDOW}, "packed", "last"),
    Family("Qwen2", "qwen2", GROUPED, "packed", "last", fast=True),
    Family("Qwen3", "qwen3", GROUPED, "packed", "last"),
    Family("Gemma 2", "gemma2", GROUPED | {"sliding_window": WINDOW}, "packed", "last"),
    Family("Gemma 3", "gemma3_text", GROUPED | {"sliding_window": WINDOW}, "packed", "last"),
    Family("Phi-3", "phi3", GROUPED | {"pad_token_id": 0}, "packed", "last"),
    Family("GPT-NeoX", "gpt_neox", SIZE, "packed", "last"),
    Family("BLOOM", "bloom", BLOOM, "padded", "last", fast=True),
    Family("Jamba", "jamba", GROUPED | {"use_mamba_kernels": False, "num_experts": 2}, "padded", "last"),
)
