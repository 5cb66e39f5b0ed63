"""The models of published figures: their configurations, from the sizes in the papers or in their config.json."""

import re
from typing import Any

from transformers import LlamaConfig, OPTConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

_LLAMA2: dict[str, Any] = {"vocab_size": 32_000, "max_position_embeddings": 4096}
_LLAMA3: dict[str, Any] = {"vocab_size": 128_256, "max_position_embeddings": 131_072, "num_key_value_heads": 8}
_LLAMA: dict[str, dict[str, Any]] = {
    r"Llama-?2-7B": _LLAMA2 | {"hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32,
                              "num_attention_heads": 32},
    r"Llama-?2-70B": _LLAMA2 | {"hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80,
                               "num_attention_heads": 64, "num_key_value_heads": 8},
    r"Llama-?3(\.1)?-8B|Llama-3-architecture-7B": _LLAMA3 | {
        "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32},
    r"Llama-3-architecture-13B": _LLAMA3 | {
        "hidden_size": 5120, "intermediate_size": 17_920, "num_hidden_layers": 40, "num_attention_heads": 40},
    r"Llama-?3(\.1)?-70B": _LLAMA3 | {
        "hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80, "num_attention_heads": 64},
    r"Llama-3\.2-3B": _LLAMA3 | {
        "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
        "tie_word_embeddings": True},
}  # fmt: skip
_QWEN3: dict[str, dict[str, Any]] = {
    "Qwen3-0.6B": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
    "Qwen3-4B": {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32},
}
# layers, hidden size and elements of a head of the GPT shapes of MPT and of FlashAttention's training script
_GPT = {
    "125m": (12, 768, 64), "350m": (24, 1024, 64), "355M": (24, 1024, 64), "760m": (24, 1536, 96),
    "1b": (24, 2048, 128), "1.3B": (24, 2048, 128), "2.7B": (32, 2560, 128), "3b": (32, 2560, 128),
    "7b": (32, 4096, 128), "13b": (40, 5120, 128), "30b": (48, 7168, 112),
}  # fmt: skip


def config_of(model: str) -> PreTrainedConfig | None:
    """The configuration of a model of the table; None for one that isotune's plan has no form for."""
    name = re.sub(r"^Meta-", "", model.replace(" ", "-"))
    for pattern, values in _LLAMA.items():
        if re.fullmatch(pattern, name, re.IGNORECASE):
            return LlamaConfig(**values)
    if name in _QWEN3:
        return Qwen3Config(
            vocab_size=151_936, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True, **_QWEN3[name]
        )
    if name == "Qwen2.5-7B":
        return Qwen2Config(
            vocab_size=152_064, hidden_size=3584, intermediate_size=18_944, num_hidden_layers=28,
            num_attention_heads=28, num_key_value_heads=4, max_position_embeddings=32_768,
        )  # fmt: skip
    size = {key.lower(): values for key, values in _GPT.items()}.get(name.split("-")[-1].lower())
    if size is None or not name.startswith(("MPT", "GPT3")):
        return None
    layers, hidden, head = size
    return OPTConfig(
        vocab_size=50_368, hidden_size=hidden, word_embed_proj_dim=hidden, ffn_dim=4 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // head, max_position_embeddings=8192, dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
