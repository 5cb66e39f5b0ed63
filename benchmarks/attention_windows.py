"""Does a long document cost what its attention's window says, or the square of its length?

    python benchmarks/attention_windows.py
    python benchmarks/attention_windows.py --longest 2048 --rounds 2     # a quick look

One causal document in a row, forward and backward of one layer's attention in fp32 on the CPU, with a sliding window
and without: packed attention beside transformers' own `eager` and `sdpa` functions, which are given the mask of the
same window. Sides take turns, and each figure is the median of the rounds. `growth` is the time of the longest document
over that of one half as long: 2 where the cost is length times window, 4 where it is the square of the length.
"""

import argparse
import functools
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import MistralConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.mistral.modeling_mistral import MistralAttention, eager_attention_forward

from isotune.models.attention_form import AttentionForm
from isotune.models.cpu.document_attention import document_attention

SHORTEST = 512
EAGER_UP_TO = 4_096  # tokens; its scores of a longer document would not fit the memory of a small machine


def main() -> int:
    """Time every side at every length, and print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--window", type=int, default=256, help="keys that a query sees, itself included")
    parser.add_argument("--longest", type=int, default=8_192, help="tokens; lengths double up to it from 512")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--key_heads", type=int, default=2)
    parser.add_argument("--head_size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    lengths = [SHORTEST]
    while 2 * lengths[-1] <= given.longest:
        lengths.append(2 * lengths[-1])
    if len(lengths) < 2:
        parser.error(f"--longest {given.longest}: growth needs a length of at least {2 * SHORTEST}")
    seconds: dict[str, dict[int, float]] = {}
    for length in lengths:
        found = measure(length, given)
        for side, median in found.items():
            seconds.setdefault(side, {})[length] = median
        print(f"{length:6,} tokens  " + "  ".join(f"{side} {1e3 * s:,.1f} ms" for side, s in found.items()), flush=True)
    result: dict[str, Any] = {"benchmark": "attention_windows", "window": given.window, "lengths": lengths}
    result |= {"heads": given.heads, "key_heads": given.key_heads, "head_size": given.head_size}
    result |= {"instruction_set": torch.backends.cpu.get_cpu_capability(), "cores": os.cpu_count()}
    result |= {"threads": torch.get_num_threads(), "rounds": given.rounds}
    result["milliseconds"] = {s: [round(1e3 * of[n], 2) for n in sorted(of)] for s, of in seconds.items()}
    result["growth"] = {s: round(of[max(of)] / of[max(of) // 2], 2) for s, of in seconds.items()}
    last = lengths[-1]
    result["sdpa_over_packed"] = round(seconds["sdpa_window"][last] / seconds["packed_window"][last], 2)
    print(json.dumps(result))
    return 0


def measure(length: int, given: argparse.Namespace) -> dict[str, float]:
    """Median seconds of forward and backward, by side."""
    sides = sides_of(length, given)
    results = {side: run().detach() for side, run in sides.items()}  # first touches
    for side, result in results.items():
        like = results["packed_window" if side.endswith("window") else "packed_full"]
        error = float((result - like).abs().max() / like.abs().max())
        assert error < 1e-4, f"{side} differs from packed attention by {error:.2g} of the largest"
    del results
    taken: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(given.rounds):
        for side in list(sides)[:: 1 if number % 2 else -1]:
            started = time.perf_counter()
            run_backward(sides[side])
            taken[side].append(time.perf_counter() - started)
    return {side: statistics.median(own) for side, own in taken.items()}


def run_backward(run: Callable[[], torch.Tensor]) -> None:
    """One forward and its backward."""
    output = run()
    output.backward(torch.ones_like(output))


def sides_of(length: int, given: argparse.Namespace) -> dict[str, Callable[[], torch.Tensor]]:
    """A function of each side's forward on the same queries, keys and values: [1, tokens, heads, head_size]."""
    torch.manual_seed(0)
    heads, key_heads, size = given.heads, given.key_heads, given.head_size
    query, key, value = (
        torch.randn(1, count, length, size, requires_grad=True) for count in (heads, key_heads, key_heads)
    )
    hidden = {"hidden_size": heads * size, "num_attention_heads": heads, "num_key_value_heads": key_heads}
    layer = MistralAttention(MistralConfig(**hidden, head_dim=size), layer_idx=0)
    scale = size**-0.5

    def packed(window: int | None) -> torch.Tensor:
        return document_attention(query, key, value, [0, length], AttentionForm(scale, causal=True, window=window))

    def stock(attend: Any, mask: torch.Tensor | None) -> torch.Tensor:
        return attend(layer, query, key, value, mask, scaling=scale, dropout=0.0)[0]

    places = torch.arange(length)
    distance = places[:, None] - places[None]
    seen = (distance >= 0) & (distance < given.window)
    sides: dict[str, Callable[[], torch.Tensor]] = {
        "packed_window": functools.partial(packed, given.window),
        "packed_full": functools.partial(packed, None),
        "sdpa_window": functools.partial(stock, sdpa_attention_forward, seen[None, None]),
        "sdpa_full": functools.partial(stock, sdpa_attention_forward, None),
    }
    if length <= EAGER_UP_TO:
        bias = torch.zeros(1, 1, length, length).masked_fill_(~seen, -torch.inf)
        sides["eager_window"] = functools.partial(stock, eager_attention_forward, bias)
    return sides


if __name__ == "__main__":
    raise SystemExit(main())
