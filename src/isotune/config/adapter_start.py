"""What LoRA may start from: the values of peft's init_lora_weights that depend on nothing but the base and the seed."""

import re

_WORDS = ("gaussian", "orthogonal", "pissa", "olora")
_REFUSED = {
    "loftq": "loftq puts rounded weights in the base's place, which no adapter holds: tune: qlora trains over 4 bits",
    "eva": "eva reads activations of the data before the first step, and its result depends on how they are read",
    "corda": "corda reads activations of the data before the first step, and its result depends on how they are read",
    "lora_ga": "lora_ga reads gradients of the data before the first step, and its result depends on how they are read",
    "mica": "mica freezes a half that is no part of a checkpoint",
}


def read_start(value: object) -> bool | str:
    """A value of init_lora_weights; ValueError, as the end of a sentence, for one that is not offered."""
    if isinstance(value, bool):
        return value
    word = str(value).lower()
    if word in ("true", "false", "yes", "no", "on", "off"):
        return word in ("true", "yes", "on")
    if word in _WORDS or re.fullmatch(r"pissa_niter_[1-9]\d*", word):
        return word
    raise ValueError(_REFUSED.get(word) or f"it takes true, false, {', '.join(_WORDS)} or pissa_niter_N, such as 16")
