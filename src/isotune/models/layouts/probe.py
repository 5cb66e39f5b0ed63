"""The documents on which layouts are measured, and the weights: nothing of a model is right only because it is new."""

import contextlib
import functools
from collections.abc import Iterator
from itertools import accumulate, chain
from typing import Any

import torch
from torch import nn

from isotune.compat.torch import unpatch_forward
from isotune.io.errors import RunFault, UserError
from isotune.models.document_dropout import training_microbatch
from isotune.models.document_keys import MicrobatchDocuments
from isotune.models.layouts.heads import head_modules, is_of_head
from isotune.models.layouts.layout import Logits, alone_logits, share_dropout, sparse_beyond
from isotune.models.packed_attention import max_positions

LENGTHS = (5, 14, 9)
LONGEST_PROBE = 800  # tokens: no longer document is run to see what a window does
BEYOND_WINDOW = 9  # tokens
WINDOWS = ("sliding_window", "local_attention", "attention_window", "window_size")  # of configurations, in tokens
# Of the spread of the logits over the documents, or of a fifth of the largest logit where that is more.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.bfloat16: 0.5, torch.float16: 0.1}
MEASURED_IN_FP32 = 10**9  # parameters: larger models are measured in their own 16 bits
SMALL = 10**7  # parameters: what is larger has a signal of its own


class Probe:
    """Random documents, and how much the logits of a layout differ from those of the documents alone."""

    def __init__(self, model: Any, longest: int | None) -> None:
        self.model, config = model, model.config.get_text_config()
        # of any document, in tokens
        self.longest = min((n for n in (longest, max_positions(model.config)) if n is not None), default=float("inf"))
        limit = int(min(self.longest, LONGEST_PROBE))
        windows = [window for name in WINDOWS for window in _integers(getattr(config, name, None))]
        windows += _integers(sparse_beyond(config))
        beyond = {w + BEYOND_WINDOW for w in windows if max(LENGTHS) < w + BEYOND_WINDOW <= LONGEST_PROBE}
        lengths = [min(n, limit) for n in (*LENGTHS, *sorted(beyond))]
        ids = _ordinary_tokens(config)
        draw = torch.Generator().manual_seed(0)
        self.documents = [ids[torch.randint(len(ids), (n,), generator=draw)].to(model.device) for n in lengths]
        self.bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=model.device)
        self.expected = torch.empty(0)

    def logits(self, function: Logits) -> torch.Tensor:
        """The logits of all documents in one microbatch, [documents, classes]."""
        return function(self.model, torch.cat(self.documents)[None], self.bounds, {}).float()

    def difference(self, function: Logits) -> str:
        """A sentence where the logits are not those of the documents alone; else nothing."""
        return self._compare(self.logits(function), self.expected, "its logits differ")

    def shared_dropouts(self) -> tuple[str, ...]:
        """Names of the dropout modules that get the same tensor whatever the documents, as DeBERTa's of positions."""
        inputs: dict[str, list[torch.Tensor]] = {}

        def note(name: str, _: nn.Module, args: tuple) -> None:
            inputs.setdefault(name, []).append(args[0])

        hooks = [
            module.register_forward_pre_hook(functools.partial(note, name))
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Dropout)
        ]
        try:
            for document in self.documents[:2]:
                bounds = self.bounds.new_tensor([0, len(document)])
                alone_logits(self.model, document[None], bounds, {})
        finally:
            for hook in hooks:
                hook.remove()
        halves = {name: (found[: len(found) // 2], found[len(found) // 2 :]) for name, found in inputs.items()}
        return tuple(name for name, (one, other) in halves.items() if all(map(torch.equal, one, other)))

    def dropout_difference(self, function: Logits, shared: tuple[str, ...]) -> str:
        """The same with dropout, against the same function on each document in a microbatch of its own."""
        lengths = [len(document) for document in self.documents]

        def draw(chosen: range) -> torch.Tensor:
            torch.manual_seed(0)
            part = [self.documents[number] for number in chosen]
            bounds = torch.tensor([0, *accumulate(map(len, part))], dtype=torch.int32, device=self.model.device)
            with training_microbatch(MicrobatchDocuments(chosen, [lengths[n] for n in chosen], padded=True)):
                return function(self.model, torch.cat(part)[None], bounds, {}).float()

        self.model.train()
        modules = [self.model.get_submodule(name) for name in shared]
        for module in modules:
            share_dropout(module)
        try:
            together = draw(range(len(lengths)))
            each = torch.cat([draw(range(number, number + 1)) for number in range(len(lengths))])
        except RunFault as fault:
            return str(fault).split(":")[0]
        finally:
            self.model.eval()
            for module in modules:
                unpatch_forward(module)
        return self._compare(together, each, "with dropout its logits differ")

    def _compare(self, found: torch.Tensor, expected: torch.Tensor, what: str) -> str:
        if found.shape != expected.shape:
            return f"it returns logits {list(found.shape)} for {len(expected)} texts"
        spread = (expected - expected.mean(dim=0)).abs().max()
        scale = torch.maximum(spread, 0.2 * expected.abs().max()).clamp(min=1e-9)
        error = float((found - expected).abs().max() / scale)
        return "" if error <= TOLERANCE[self.dtype] else f"{what} by {error:.2g} of their spread from each text alone"

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrix products."""
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())


def _integers(value: Any) -> list[int]:
    values = value if isinstance(value, (list, tuple)) else [value]
    return [item for item in values if isinstance(item, int) and not isinstance(item, bool)]


def _ordinary_tokens(config: Any) -> torch.Tensor:
    """Token ids without those that configurations give a meaning, int64."""
    if getattr(config, "vocab_size", None) is None:
        raise UserError(f"model type '{config.model_type}' has no vocabulary: choose one that reads tokens")
    special = chain.from_iterable(
        _integers(value) for name, value in config.to_dict().items() if name.endswith("_token_id")
    )
    allowed = torch.ones(config.vocab_size, dtype=torch.bool)
    allowed[[token for token in special if 0 <= token < len(allowed)]] = False
    return allowed.nonzero()[:, 0]


def is_small(model: Any) -> bool:
    """Whether a model may have hardly any signal, because it is new."""
    return sum(tensor.numel() for tensor in chain(model.parameters(), model.buffers())) <= SMALL


@contextlib.contextmanager
def as_measured(model: Any, *, noise: bool) -> Iterator[None]:
    """Within it the weights are such that differences show; then they are the model's own again, to the bit.

    In fp32 where they fit, without matrices of zeros in the head, and where asked for with noise that keeps the size of
    states from layer to layer.
    """
    tensors = list(chain(model.parameters(), model.buffers()))
    own = [(tensor, tensor.data) for tensor in tensors if type(tensor) in (torch.Tensor, nn.Parameter)]
    count = sum(tensor.numel() for tensor in tensors)
    names = head_modules(model)
    head = {id(parameter) for name, parameter in model.named_parameters() if is_of_head(name, names)}
    try:
        for tensor, data in own:
            if not data.is_floating_point():
                continue
            if len(own) == len(tensors) and count <= MEASURED_IN_FP32 and data.element_size() < 4:
                tensor.data = data.float()
            is_matrix = isinstance(tensor, nn.Parameter) and tensor.ndim > 1
            if is_matrix and (noise or (id(tensor) in head and not data.any())):
                tensor.data = tensor.data + torch.randn_like(tensor.data) * data.shape[-1] ** -0.5
        yield
    finally:
        for tensor, data in own:
            tensor.data = data
