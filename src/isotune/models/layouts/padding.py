"""Documents of a row as a padded batch, for models whose attention or state cannot tell them apart.

packed row   [ a0 a1 a2 | b0 b1 ]   ->   [ a0 a1 a2 ]   ->   [ A0 A1 A2 | B0 B1 ]
                                         [ b0 b1 .  ]
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from isotune.models.packed_attention import lengths_of

# Arguments of a packed forward that describe the row; a padded batch has its mask instead.
OF_THE_ROW = ("cu_seq_lens_k", "max_length_q", "max_length_k", "position_ids", "attention_mask")


def padded_batch(input_ids: torch.Tensor, bounds: torch.Tensor, pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [documents, longest] of a row [1, tokens], filled with `pad` on the right, and their mask, int64.

    `bounds` int32 [documents + 1] are where each document begins and the last ends.
    """
    texts = input_ids[0].split(lengths_of(bounds))
    batch = nn.utils.rnn.pad_sequence(list(texts), batch_first=True, padding_value=pad)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
    return batch, mask


def pad_documents(model: Any, pad: int) -> None:
    """Make a causal model take packed rows although its documents would see each other there.

    Inside, each document is a line of a batch, filled with `pad` on the right, which no earlier token sees. The states
    or logits are those of the row again, [1, tokens, ...]. Calls without `cu_seq_lens_q` are as they were. Neither this
    nor the loss relies on `patch_forward` being used once only: a model may be its own body.
    """
    bodies = {id(body): body for body in (model.base_model, model.get_decoder()) if isinstance(body, nn.Module)}
    # the boundaries while the model runs its body, for not every type hands them down; None where it is padded already
    row: list[torch.Tensor | None] = [None]

    def forward_body(stock: Any, input_ids: torch.Tensor, *args: Any, cu_seq_lens_q: Any = None, **kwargs: Any) -> Any:
        bounds = row[-1] if cu_seq_lens_q is None else cu_seq_lens_q
        if bounds is None:
            return stock(input_ids, *args, **kwargs)
        batch, mask = padded_batch(input_ids, bounds, pad)
        with _held(row, None):
            output = stock(batch, *args, **_without_row(kwargs), attention_mask=mask)
        starts = range(0, batch.numel(), batch.shape[1])
        lines = zip(starts, lengths_of(bounds), strict=True)
        places = torch.cat([torch.arange(start, start + n) for start, n in lines]).to(batch.device)
        for name in ("last_hidden_state", "logits"):
            if getattr(output, name, None) is not None:
                output[name] = getattr(output, name).flatten(0, 1)[places][None]
        return output

    def forward(stock: Any, input_ids: torch.Tensor, *args: Any, cu_seq_lens_q: Any = None, **kwargs: Any) -> Any:
        if cu_seq_lens_q is None:
            return stock(input_ids, *args, **kwargs)
        with _held(row, cu_seq_lens_q):
            return stock(input_ids, *args, **_without_row(kwargs))

    for body in bodies.values():
        body.forward = functools.partial(forward_body, body.forward)
    if id(model) not in bodies:
        model.forward = functools.partial(forward, model.forward)


@contextlib.contextmanager
def _held(stack: list[Any], value: Any) -> Iterator[None]:
    stack.append(value)
    try:
        yield
    finally:
        stack.pop()


def _without_row(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name not in OF_THE_ROW} | {"return_dict": True}
