"""bitsandbytes 0.50: a warning at import, a kernel that cannot train, and a cast of biases that are trained."""

import logging
from functools import partial
from typing import Any

from torch import Tensor
from torch.func import functional_call


def silence_import_warning() -> None:
    """bitsandbytes warns at import about an optional CPU kernel that nobody asked for; its errors are still logged."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def keep_trainable(model: Any) -> None:
    """Keep bitsandbytes from repacking 4-bit weights on CPU at the first evaluation, for a kernel without backward."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def keep_trained_biases(model: Any) -> None:
    """Keep bitsandbytes from casting trained biases, in place, to the type of what goes into their layers."""
    for module in model.modules():
        bias = getattr(module, "bias", None)
        if type(module).__module__.startswith("bitsandbytes.") and bias is not None and bias.requires_grad:
            module.forward = partial(_forward_with_cast_bias, module, module.forward)


def _forward_with_cast_bias(module: Any, forward: Any, x: Tensor) -> Any:
    if module.bias.dtype == x.dtype:
        return forward(x)
    return functional_call(module, {"bias": module.bias.to(x.dtype)}, (x,))  # which comes back here with that bias
