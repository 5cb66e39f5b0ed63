"""What an attention computes beside its products: scale, direction, window, cap and sinks."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional


@dataclass(frozen=True)
class AttentionForm:
    """What makes weights of the products of queries and keys.

    With a `window` a token sees the keys that are fewer than `window` tokens away, itself included. `softcap` c makes
    c tanh(score / c) of each score (Gemma 2, arXiv:2408.00118).
    """

    scale: float  # multiplies the products
    causal: bool  # a token sees no later one
    window: int | None = None
    softcap: float | None = None

    def is_plain(self, tokens: int) -> bool:
        """Whether a document of this length is a softmax of all products, or of all earlier ones."""
        return self.softcap is None and (self.window is None or tokens <= self.window)

    def blocks(self, tokens: int, queries: int) -> Iterator[tuple[slice, slice]]:
        """Blocks of at most `queries` query rows of a document, each with the keys that they attend to."""
        reach = tokens if self.window is None else self.window - 1
        for start in range(0, tokens, queries):
            stop = min(start + queries, tokens)
            yield slice(start, stop), slice(max(0, start - reach), stop if self.causal else min(stop + reach, tokens))

    def hidden(self, rows: slice, keys: slice, device: torch.device | str = "cpu") -> torch.Tensor | None:
        """Which keys each query does not see, bool [rows, keys]; None where each sees all of them."""
        furthest = max(rows.stop - 1 - keys.start, keys.stop - 1 - rows.start)
        reach = furthest if self.window is None else self.window - 1
        if not self.causal and furthest <= reach:
            return None
        rows_at = torch.arange(rows.start, rows.stop, device=device)[:, None]
        after = torch.arange(keys.start, keys.stop, device=device) - rows_at
        return (after < -reach) | (after > (0 if self.causal else reach))


def whole_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    form: AttentionForm,
    *,
    sinks: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    dropout: float = 0.0,
    drops_by_device: bool = False,
) -> torch.Tensor:
    """Attention of texts of one length each, with all scores in memory, for what torch's kernel cannot compute.

    `query` is [texts, heads, queries, size], `key` and `value` [texts, key_heads, keys, size]; the last query is at the
    last key. `mask` [texts, 1, queries, keys] is true where a key is seen, or is added to the scores; without one, the
    form's direction and window decide. `sinks` [heads] are one more score of every query, whose weight goes to no value
    (Xiao et al. 2023, arXiv:2309.17453). Scores and softmax are fp32. With `drops_by_device` the device's generator
    decides which weights are dropped, as in torch's kernel, also where dropout is patched. Returns
    [texts, heads, queries, size].
    """
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
    scores = query @ key.transpose(-2, -1)
    scores = (scores if scores.dtype == torch.float64 else scores.float()) * form.scale
    if form.softcap is not None:
        scores = torch.tanh(scores / form.softcap) * form.softcap
    if mask is None:
        queries, keys = scores.shape[-2:]
        hidden = form.hidden(slice(keys - queries, keys), slice(0, keys), scores.device)
        mask = None if hidden is None else ~hidden
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    if sinks is None:
        weights = scores.softmax(-1)
    else:
        column = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, column], dim=-1).softmax(-1)[..., :-1]
    drop = torch.dropout if drops_by_device else functional.dropout
    return drop(weights.to(value.dtype), dropout, dropout > 0) @ value
