"""What a base model's generation_config.json would change in its answers, and how it is kept from that.

Instruct models ship rules of their own (Qwen2.5 a repetition penalty, others beams, forbidden tokens, a shortest
length). transformers applies them to every call of `generate` that does not name the same setting, so a greedy
evaluation would be of something else, and beams would make rows out of rows. Here a token is chosen as `Decoding` says.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import GenerationConfig

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
# of the length, which is always asked for, and of how answers are computed and returned
_NO_RULES = frozenset(
    {*TOKEN_IDS, "max_length", "max_new_tokens", "transformers_version", "use_cache", "cache_implementation"}
    | {"cache_config", "max_cache_len", "output_attentions", "output_hidden_states", "output_scores", "output_logits"}
    | {"return_dict_in_generate", "compile_config", "disable_compile", "continuous_batching_config"}
)


def rules_of_base(model: Any) -> dict[str, Any]:
    """The settings of the model's generation_config that would change which tokens are chosen, as JSON has them."""
    own = json.loads(model.generation_config.to_json_string(use_diff=True))
    return {name: own[name] for name in sorted(own) if name not in _NO_RULES and not name.startswith("_")}


@contextmanager
def without_base_rules(model: Any) -> Iterator[None]:
    """Within it `model.generate` does what its arguments say and no more; the model's special tokens stay."""
    own = model.generation_config
    model.generation_config = GenerationConfig(**{name: getattr(own, name, None) for name in TOKEN_IDS})
    try:
        yield
    finally:
        model.generation_config = own
