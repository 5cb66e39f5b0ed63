"""bitsandbytes 0.50, and BitsAndBytesConfig of transformers 5.23."""

import logging
from collections.abc import Sequence
from typing import Any


def silence_import_warning() -> None:
    """bitsandbytes warns at import about an optional CPU kernel that nobody asked for; its errors are still logged."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def keep_trainable(model: Any) -> None:
    """Keep bitsandbytes from repacking 4-bit weights on CPU at the first evaluation, for a kernel without backward."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def unquantized_modules(names: Sequence[str]) -> list[str] | None:
    """`llm_int8_skip_modules`, which is for 4 bits too: modules of these names, wherever they are in the model.

    None leaves the choice to transformers, which knows output layers but not a pooler.
    """
    return [rf"(.*\.)?{name}" for name in names] or None
