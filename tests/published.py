"""Geometry of models as their config.json on the Hub says it, for what has to be planned without their weights."""

from typing import Any

LLAMA_SHAPED: dict[str, Any] = {"hidden_act": "silu", "rms_norm_eps": 1e-5, "attention_bias": False}

# by the name of the shipped recipe: the configuration, and the parameters that its layers' sizes add up to
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "llama3.2_1b_lora": (
        LLAMA_SHAPED
        | {
            "model_type": "llama", "vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192,
            "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
            "max_position_embeddings": 131_072, "rope_theta": 500_000.0, "tie_word_embeddings": True,
            "bos_token_id": 128_000, "eos_token_id": 128_001,
        },
        # embedding, then a layer's attention (q and o, k and v), its three products and two norms, and the last norm
        128_256 * 2048 + 16 * (2 * 2048 * 2048 + 2 * 2048 * 512 + 3 * 2048 * 8192 + 2 * 2048) + 2048,
    ),
    "qwen3_0.6b_full": (
        LLAMA_SHAPED
        | {
            "model_type": "qwen3", "vocab_size": 151_936, "hidden_size": 1024, "intermediate_size": 3072,
            "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
            "max_position_embeddings": 40_960, "rope_theta": 1_000_000.0, "tie_word_embeddings": True,
            "rms_norm_eps": 1e-6, "bos_token_id": 151_643, "eos_token_id": 151_645,
        },
        # queries and keys have a norm of 128 each
        151_936 * 1024 + 28 * (2 * 1024 * 2048 + 2 * 1024 * 1024 + 3 * 1024 * 3072 + 2 * 1024 + 2 * 128) + 1024,
    ),
    "qwen3_8b_qlora_24gb": (
        LLAMA_SHAPED
        | {
            "model_type": "qwen3", "vocab_size": 151_936, "hidden_size": 4096, "intermediate_size": 12_288,
            "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
            "max_position_embeddings": 40_960, "rope_theta": 1_000_000.0, "tie_word_embeddings": False,
            "rms_norm_eps": 1e-6, "bos_token_id": 151_643, "eos_token_id": 151_645,
        },
        2 * 151_936 * 4096
        + 36 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 12_288 + 2 * 4096 + 2 * 128) + 4096,
    ),
    "gemma3_1b_lora": (
        {
            "model_type": "gemma3_text", "vocab_size": 262_144, "hidden_size": 1152, "intermediate_size": 6912,
            "num_hidden_layers": 26, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256,
            "max_position_embeddings": 32_768, "sliding_window": 512, "query_pre_attn_scalar": 256,
            "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0,
        },
        # four norms of a layer, and those of queries and keys
        262_144 * 1152 + 26 * (2 * 1152 * 1024 + 2 * 1152 * 256 + 3 * 1152 * 6912 + 4 * 1152 + 2 * 256) + 1152,
    ),
    "mistral7b_qlora_24gb": (
        LLAMA_SHAPED
        | {
            "model_type": "mistral", "vocab_size": 32_768, "hidden_size": 4096, "intermediate_size": 14_336,
            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
            "max_position_embeddings": 32_768, "rope_theta": 1_000_000.0, "sliding_window": None,
            "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
        },
        2 * 32_768 * 4096 + 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14_336 + 2 * 4096) + 4096,
    ),
    "smollm3_3b_lora": (
        LLAMA_SHAPED
        | {
            "model_type": "smollm3", "vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 11_008,
            "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 4,
            "max_position_embeddings": 65_536, "rope_theta": 5_000_000.0, "tie_word_embeddings": True,
            "rms_norm_eps": 1e-6, "bos_token_id": 128_000, "eos_token_id": 128_001, "pad_token_id": 128_004,
        },
        128_256 * 2048 + 36 * (2 * 2048 * 2048 + 2 * 2048 * 512 + 3 * 2048 * 11_008 + 2 * 2048) + 2048,
    ),
    "modernbert_base_imdb": (
        {
            "model_type": "modernbert", "vocab_size": 50_368, "hidden_size": 768, "intermediate_size": 1152,
            "num_hidden_layers": 22, "num_attention_heads": 12, "max_position_embeddings": 8192,
            "local_attention": 128, "global_attn_every_n_layers": 3, "pad_token_id": 50_283, "cls_token_id": 50_281,
            "sep_token_id": 50_282, "bos_token_id": 50_281, "eos_token_id": 50_282,
        },
        # no biases; the first layer has no norm before its attention; the head is a product and a norm, and the classes
        50_368 * 768 + 768 + 22 * (4 * 768 * 768 + 2 * 768 * 1152 + 1152 * 768 + 2 * 768) - 768 + 768
        + 768 * 768 + 768 + 2 * 768 + 2,
    ),
    "deberta_v3_base_yelp": (
        {
            "model_type": "deberta-v2", "vocab_size": 128_100, "hidden_size": 768, "intermediate_size": 3072,
            "num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 512, "type_vocab_size": 0,
            "relative_attention": True, "position_buckets": 256, "norm_rel_ebd": "layer_norm", "share_att_key": True,
            "pos_att_type": ["p2c", "c2p"], "position_biased_input": False, "max_relative_positions": -1,
            "pooler_hidden_size": 768, "pooler_dropout": 0, "pooler_hidden_act": "gelu", "layer_norm_eps": 1e-7,
            "pad_token_id": 0,
        },
        # embedding and its norm; relative positions and their norm; a layer; pooler and classes
        128_100 * 768 + 2 * 768 + 512 * 768 + 2 * 768
        + 12 * (4 * (768 * 768 + 768) + 2 * 768 * 3072 + 3072 + 768 + 4 * 768) + 768 * 768 + 768 + 5 * 768 + 5,
    ),
    "xlmr_base": (
        {
            "model_type": "xlm-roberta", "vocab_size": 250_002, "hidden_size": 768, "intermediate_size": 3072,
            "num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 514, "type_vocab_size": 1,
            "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "layer_norm_eps": 1e-5,
        },
        # words, positions, types and their norm; a layer; the head's product and the classes
        (250_002 + 514 + 1) * 768 + 2 * 768 + 12 * (4 * (768 * 768 + 768) + 2 * 768 * 3072 + 3072 + 768 + 4 * 768)
        + 768 * 768 + 768 + 5 * 768 + 5,
    ),
}  # fmt: skip
