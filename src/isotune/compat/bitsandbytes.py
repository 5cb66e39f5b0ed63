"""bitsandbytes 0.50: a warning at import, and a kernel that cannot train."""

import logging
from typing import Any


def silence_import_warning() -> None:
    """bitsandbytes warns at import about an optional CPU kernel that nobody asked for; its errors are still logged."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def keep_trainable(model: Any) -> None:
    """Keep bitsandbytes from repacking 4-bit weights on CPU at the first evaluation, for a kernel without backward."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
