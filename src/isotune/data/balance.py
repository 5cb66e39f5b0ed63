"""Shares things of different cost out evenly: a step's rows to ranks, and a rank's rows to microbatches.

Longest-processing-time first (Graham 1969) puts the costliest thing left into the share that has least. It is off by
up to a third of the mean, so swaps follow: as long as the costliest share gets cheaper by giving one thing away, or by
exchanging it for one of another share, it does. That looks at every thing for each swap. Where a step's rows are
shared out to hundreds of ranks, those that are much above the mean exchange with lighter ones, many pairs at once.
"""

import heapq
from collections.abc import Sequence

import numpy as np

MAX_SWAPS_PER_SHARE = 8
LEAST_GAIN = 1e-9  # of the costlier share, by an exchange
SHARES_AT_ONCE = 64  # fewer things are placed one by one
MANY = 2**18  # things times shares, above which the exchanges of `deal` are `quick`
ENOUGH = 0.015  # above the mean: quick exchanges leave alone what is below
MAX_ROUNDS = 24  # of quick exchanges
PAIRED_AT_ONCE = 2**19  # exchanges that one round looks at


def share_out(costs: Sequence[float] | np.ndarray, shares: int) -> list[np.ndarray]:
    """Things, by their number, in `shares` of near-equal summed cost; some are empty where there are fewer things.

    `costs` are positive, [things]. Returns ascending int64 arrays, the same for the same costs on every machine.
    """
    share_of = deal(costs, shares)
    ends = np.cumsum(np.bincount(share_of, minlength=shares))
    return np.split(np.argsort(share_of, kind="stable"), ends[:-1])


def deal(costs: Sequence[float] | np.ndarray, shares: int, *, quick: bool = False) -> np.ndarray:
    """The share of each thing, int64 [things]: see `share_out`.

    `quick`: other exchanges, in much less time, where there are many things and shares.
    """
    costs = np.asarray(costs, np.float64)
    if shares == 1:
        return np.zeros(len(costs), np.int64)
    share_of, loads = _longest_first(costs, shares)
    if quick and len(costs) * shares > MANY:
        return _exchange_quickly(costs, share_of, loads)
    for _ in range(MAX_SWAPS_PER_SHARE * shares if len(costs) else 0):
        if not _improve(costs, share_of, loads):
            break
    return share_of


def _longest_first(costs: np.ndarray, shares: int) -> tuple[np.ndarray, np.ndarray]:
    """The share of each thing, the costliest one first to the share that has least, and the load of each share.

    Many things are placed at once: to the lightest share, the next one and so on, as long as each of these is lighter
    than all that have got a thing before it.
    """
    order = np.argsort(-costs, kind="stable")
    share_of, loads = np.zeros(len(costs), np.int64), np.zeros(shares)
    placed, many = 0, SHARES_AT_ONCE
    while len(order) - placed >= SHARES_AT_ONCE <= many:
        lightest = np.argsort(loads, kind="stable")[: len(order) - placed]
        things = order[placed : placed + len(lightest)]
        before, after = loads[lightest], loads[lightest] + costs[things]
        is_next = before[1:] < np.minimum.accumulate(after)[:-1]
        many = len(things) if is_next.all() else 1 + int(is_next.argmin())
        share_of[things[:many]], loads[lightest[:many]] = lightest[:many], after[:many]
        placed += many
    heap = sorted(zip(loads.tolist(), range(shares), strict=True))
    for thing in order[placed:].tolist():
        load, share = heap[0]
        share_of[thing] = share
        heapq.heapreplace(heap, (load + float(costs[thing]), share))
    for load, share in heap:
        loads[share] = load
    return share_of, loads


def _improve(costs: np.ndarray, share_of: np.ndarray, loads: np.ndarray) -> bool:
    """Make the costliest share cheaper by the best gift or exchange; false where there is none."""
    top = int(loads.argmax())
    own, others = np.flatnonzero(share_of == top), np.flatnonzero(share_of != top)
    # what moves from the costliest share to each share, on balance: [own, other things], then [own, shares]
    swap = costs[own][:, None] - costs[others][None]
    after_swap = np.maximum(loads[top] - swap, loads[share_of[others]][None] + swap)
    after_gift = np.maximum(loads[top] - costs[own][:, None], loads[None] + costs[own][:, None])
    after_gift[:, top] = np.inf
    best_swap = after_swap.min() if after_swap.size else np.inf
    if min(best_swap, after_gift.min()) >= loads[top] * (1 - LEAST_GAIN):
        return False
    if best_swap < after_gift.min():
        i, j = np.unravel_index(after_swap.argmin(), after_swap.shape)
        given, taken = own[i], others[j]
        other = share_of[taken]
        share_of[given], share_of[taken] = other, top
        moved = costs[given] - costs[taken]
    else:
        i, other = np.unravel_index(after_gift.argmin(), after_gift.shape)
        share_of[own[i]], moved = other, costs[own[i]]
    loads[top] -= moved
    loads[other] += moved
    return True


def _exchange_quickly(costs: np.ndarray, share_of: np.ndarray, loads: np.ndarray) -> np.ndarray:
    """The share of each thing when no share is more than ENOUGH above the mean, or not much more.

    In a round each share above it does the gift or exchange with one of the lighter half that leaves the costlier of
    the two cheapest: in every round with another one, as shares of one load have things of one cost.
    """
    costs = np.append(costs, 0.0)  # the last thing is none: what is exchanged for it is a gift
    seen = 0  # of the lighter half
    for _ in range(MAX_ROUNDS):
        order = np.argsort(loads, kind="stable")
        pairs = min(int((loads > loads.mean() * (1 + ENOUGH)).sum()), len(loads) // 2)
        if not pairs:
            break
        counts = np.bincount(share_of, minlength=len(loads))
        width = int(counts.max()) + 1
        pairs = min(pairs, max(PAIRED_AT_ONCE // width**2, 1))
        things = np.full((len(loads), width), -1)
        by_share = np.argsort(share_of, kind="stable")
        things[share_of[by_share], np.arange(len(by_share)) - np.repeat(np.cumsum(counts) - counts, counts)] = by_share
        top, light = order[::-1][:pairs], np.roll(order[: len(loads) // 2], -seen)[:pairs]
        seen += pairs
        moved = costs[things[top]][:, :, None] - costs[things[light]][:, None]
        after = np.maximum(loads[top, None, None] - moved, loads[light, None, None] + moved).reshape(pairs, -1)
        best = after.argmin(axis=1)
        gains = after[np.arange(pairs), best] < loads[top] * (1 - LEAST_GAIN)
        given, taken = things[top, best // width][gains], things[light, best % width][gains]
        share_of[given[given >= 0]] = light[gains][given >= 0]
        share_of[taken[taken >= 0]] = top[gains][taken >= 0]
        loads = np.bincount(share_of, costs[:-1], len(loads))
    return share_of
