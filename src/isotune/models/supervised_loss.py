"""The summed cross-entropy of the supervised positions, in chunks, without all their logits in memory at once.

Full-vocabulary fp32 logits are most of a small model's peak memory, and most of them are of prompts, which are not
supervised. Here the head runs on the supervised positions only, a few hundred at a time. The gradient of the sum is
known as soon as the logits are, so the forward pass keeps it (one fp32 row of the hidden size per position) and the
backward pass only scales it: no logits are kept, and none are computed twice. On a GPU with Triton cuda/loss_head.py
does the same with a kernel of its own.
"""

import inspect
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from isotune.compat.peft import base_model_of, without_new_rows
from isotune.compat.torch import AutogradFunction, patch_forward
from isotune.io.errors import UserError
from isotune.models.cpu.functional import Workspace
from isotune.models.cuda import loss_head
from isotune.models.cuda.casts import kept_cast

# Measured on 2 cores with a 512 x 50,272 head in bf16: below 256 positions the products slow down, and the fp32 softmax
# is four times as fast while its slice stays in the cache. A weight gradient is faster with wider products.
POSITIONS_PER_PRODUCT = 256
POSITIONS_PER_WEIGHT_GRADIENT = 512
SOFTMAX_ELEMENTS = 2**20
# fp16 has nothing below 6e-8, and most probabilities of a large vocabulary are smaller: gradients of logits are scaled
# up by this before they are rounded. Each row's absolute sum is at most 2, so products stay far from 65504.
FP16_SCALE = 256.0

# What the configurations of transformers call the number that a model divides or multiplies its logits by, and the cap
# c of c tanh(logit / c).
DIVISORS, FACTORS = ("logits_scaling",), ("logit_scale", "lm_head_multiplier")
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


@dataclass(frozen=True)
class LogitsTransform:
    """What a model does to its logits above the head: c tanh(scale x logit / c), where there is a cap c."""

    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "LogitsTransform":
        """That of a configuration, by the names of its keys; whether a model does it so has to be measured."""
        scale = math.prod(1.0 / value for name in DIVISORS if (value := getattr(config, name, None)))
        scale *= math.prod(value for name in FACTORS if (value := getattr(config, name, None)))
        caps = [value for name in CAPS if (value := getattr(config, name, None))]
        return cls(float(scale), float(caps[0]) if caps else None)


PLAIN_LOGITS = LogitsTransform()


def is_cpu(device: torch.device) -> bool:
    """Whether to use chunks that fit a CPU's caches."""
    return device.type == "cpu"


def supervised_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    transform: LogitsTransform = PLAIN_LOGITS,
) -> torch.Tensor:
    """Sum of the cross-entropies of `targets` under the transformed logits `hidden @ weight.T + bias`.

    `hidden` [targets, size] are the decoder's last states at the supervised positions; `weight` is [vocabulary, size],
    `bias` [vocabulary] or None, `targets` int64 [targets]. Products run in the autocast dtype, or else in that of
    `weight`; softmax and sums are fp32. Without targets it is a zero that is connected to the graph.
    """
    device = hidden.device.type
    compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    return _SupervisedLoss.apply(hidden, weight, bias, targets, transform, compute, torch.is_grad_enabled())


class _SupervisedLoss(AutogradFunction):
    @staticmethod
    def forward(ctx: Any, hidden, weight, bias, targets, transform, compute, with_gradients) -> torch.Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            needed = [with_gradients and need for need in ctx.needs_input_grad[:3]]
            loss, gradients = _loss_and_gradients(hidden, weight, bias, targets, transform, compute, needed)
        ctx.dtypes = [None if t is None else t.dtype for t in (hidden, weight, bias)]
        ctx.gradients = gradients
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        assert ctx.gradients is not None, "the gradients were scaled in place: one backward pass per forward pass"
        gradients, ctx.gradients = ctx.gradients, None
        # in place, because the head's gradient is as large as the head: 103 MB of fp32 for 512 x 50,272
        scaled = [None if g is None else g.mul_(grad).to(dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True)]
        return (*scaled, None, None, None, None)


def _loss_and_gradients(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    transform: LogitsTransform,
    compute: torch.dtype,
    needed: list[bool],
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """The loss in fp32, and the gradients of hidden, weight and bias in the accumulation dtype where needed."""
    accumulate = torch.float64 if compute == torch.float64 else torch.float32
    states, head = hidden.to(compute), kept_cast(weight, compute)
    scale = FP16_SCALE if compute == torch.float16 else 1.0
    kernel = loss_head.triton_kernel(hidden.device) if accumulate == torch.float32 else None
    if kernel is not None:
        return loss_head.loss_and_gradients(kernel, states, head, bias, targets, transform, scale, needed)
    loss = torch.zeros((), dtype=accumulate, device=hidden.device)
    hidden_gradient = torch.empty_like(hidden, dtype=accumulate) if needed[0] else None
    weight_gradient = None
    bias_gradient = torch.zeros_like(bias, dtype=accumulate) if needed[2] and bias is not None else None
    step = POSITIONS_PER_WEIGHT_GRADIENT if needed[1] or not is_cpu(hidden.device) else POSITIONS_PER_PRODUCT
    for start in range(0, len(targets), step):
        rows = slice(start, start + step)
        buffer = _workspace("logits", (min(step, len(targets) - start), len(head)), compute, hidden.device)
        logits = torch.mm(states[rows], head.t(), out=buffer)
        loss += _loss_into_gradient(logits, targets[rows], transform, bias, bias_gradient, scale, any(needed))
        if hidden_gradient is not None:
            torch.mul(logits @ head, 1.0 / scale, out=hidden_gradient[rows])
        if needed[1]:
            product = logits.t() @ states[rows]
            if weight_gradient is None:
                weight_gradient = product.to(accumulate)
            else:
                weight_gradient += product
    if needed[1] and weight_gradient is None:
        weight_gradient = torch.zeros_like(weight, dtype=accumulate)
    if weight_gradient is not None and scale != 1.0:
        weight_gradient.div_(scale)
    return loss, [hidden_gradient, weight_gradient, bias_gradient]


def _loss_into_gradient(
    logits: torch.Tensor,
    targets: torch.Tensor,
    transform: LogitsTransform,
    bias: torch.Tensor | None,
    bias_gradient: torch.Tensor | None,
    scale: float,
    needs_gradient: bool,
) -> torch.Tensor:
    """Replace logits [positions, vocabulary] by `scale` times the gradient of their summed loss; returns the loss."""
    accumulate = torch.float64 if logits.dtype == torch.float64 else torch.float32
    loss = torch.zeros((), dtype=accumulate, device=logits.device)
    step = max(1, SOFTMAX_ELEMENTS // logits.shape[1]) if is_cpu(logits.device) else len(targets)
    for start in range(0, len(targets), step):
        part, expected = logits[start : start + step], targets[start : start + step, None]
        exact = _workspace("exact", part.shape, accumulate, part.device).copy_(part)
        if bias is not None:
            exact += bias
        if transform.scale != 1.0:
            exact *= transform.scale
        slope = None
        if transform.cap is not None:
            torch.tanh(exact.div_(transform.cap), out=exact)
            slope = 1 - exact.square()
            exact *= transform.cap
        # logsumexp(x) = x_m - log p_m at the largest logit x_m, whose probability p_m is never tiny
        largest, chosen = exact.amax(dim=1, keepdim=True), exact.gather(1, expected)
        buffer = _workspace("probabilities", part.shape, accumulate, part.device)
        probabilities = torch.softmax(exact, dim=1, out=buffer)
        loss += (largest - probabilities.amax(dim=1, keepdim=True).log() - chosen).sum()
        if needs_gradient:
            probabilities.scatter_add_(1, expected, probabilities.new_full(expected.shape, -1.0))
            if slope is not None:
                probabilities *= slope
            if transform.scale != 1.0:
                probabilities *= transform.scale
            if bias_gradient is not None:
                bias_gradient += probabilities.sum(dim=0)
            part.copy_(probabilities.mul_(scale) if scale != 1.0 else probabilities)
    return loss


# Kept between calls: tens of megabytes per chunk would be fresh pages each time, which cost more than the softmax.
_workspaces: defaultdict[str, Workspace] = defaultdict(Workspace)


def _workspace(name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An uninitialised tensor: on CPU in the same memory at every call, elsewhere from the allocator's cache."""
    if is_cpu(device):
        return _workspaces[name].empty(shape, dtype)
    return torch.empty(shape, dtype=dtype, device=device)


def forget_workspaces() -> None:
    """Free the memory that is kept between calls."""
    _workspaces.clear()


def install_supervised_loss(model: nn.Module) -> None:
    """Make a causal language model accept `supervised_positions` and `targets`.

    `model(input_ids=..., supervised_positions=..., targets=...)` returns an output whose `.loss` is the summed loss and
    whose `.logits` are None; without these arguments the stock forward runs. `supervised_positions` are the positions
    in the flattened row whose next token is predicted, and `targets` these tokens, both int64 [targets].

    The head is called as a module, so that ZeRO-3 and FSDP2 gather its weight. Call it before or after peft wraps
    `model`, and before DDP or DeepSpeed does. A model that does more than `decoder -> head -> transform` needs
    `use_stock_logits`. UserError where an adapter wraps its head.
    """
    base = base_model_of(model)
    assert isinstance(base, PreTrainedModel)
    base.logits_transform = None  # type: ignore[assignment]  (torch declares unknown attributes as tensors)
    head: Any = base.get_output_embeddings()
    if base.base_model is not base and (isinstance(head, nn.Linear) or _is_wrapped(head)):
        head = _plain_head(base)
        base.logits_transform = LogitsTransform.of(base.config.get_text_config())  # type: ignore[assignment]  (as above)
        if "stock_forward" not in vars(head):
            patch_forward(head, _head_forward)
    if "stock_forward" not in vars(base):
        patch_forward(base, _model_forward)


def use_stock_logits(model: nn.Module) -> None:
    """Let the loss of an installed model be that of its own logits, which are then all in memory at once."""
    base_model_of(model).logits_transform = None


def _plain_head(base: PreTrainedModel) -> Any:
    head = without_new_rows(base.get_output_embeddings())
    if not isinstance(head, nn.Linear) or _is_wrapped(head):
        raise UserError(
            "the output head (lm_head) is wrapped by an adapter or quantised, which the supervised loss cannot use: "
            "take it out of target_modules and modules_to_save"
        )
    return head


def _is_wrapped(head: Any) -> bool:
    return type(head).__module__.startswith(("peft.", "bitsandbytes."))


def _head_forward(
    self: Any, hidden: torch.Tensor, targets: torch.Tensor | None = None, transform: LogitsTransform = PLAIN_LOGITS
) -> torch.Tensor:
    if targets is None:
        return self.stock_forward(hidden)
    return supervised_loss(hidden, self.weight, self.bias, targets, transform)


def _model_forward(
    self: Any,
    *args: Any,
    supervised_positions: torch.Tensor | None = None,
    targets: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    **kwargs: Any,
) -> Any:
    if supervised_positions is None:
        return self.stock_forward(*args, labels=labels, **kwargs)
    assert targets is not None and labels is None, "supervised_positions come with targets and without labels"
    kwargs["return_dict"] = True
    if self.logits_transform is None:
        if "logits_to_keep" in inspect.signature(self.stock_forward).parameters:
            outputs = self.stock_forward(*args, logits_to_keep=supervised_positions, **kwargs)
            logits = outputs.logits.flatten(0, 1)
        else:
            outputs = self.stock_forward(*args, **kwargs)
            logits = outputs.logits.flatten(0, 1).index_select(0, supervised_positions)
        loss = nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
        return _with_loss(loss, outputs)
    head = _plain_head(self)
    assert "stock_forward" in vars(head), "the head was replaced after install_supervised_loss"
    outputs = self.base_model(*args, **kwargs)
    selected = outputs.last_hidden_state.flatten(0, 1).index_select(0, supervised_positions)
    outer = self.get_output_embeddings()
    if outer is head:
        loss = head(selected, targets=targets, transform=self.logits_transform)
    else:  # its weight is put together of the base's and the rows that are trained
        loss = supervised_loss(selected, outer.weight, head.bias, targets, self.logits_transform)
    return _with_loss(loss, outputs)


def _with_loss(loss: Any, outputs: Any) -> MoeCausalLMOutputWithPast:
    """The loss, and what routers chose by where that was asked for."""
    return MoeCausalLMOutputWithPast(loss=loss, router_logits=getattr(outputs, "router_logits", None))
