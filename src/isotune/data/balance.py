"""Shares things of different cost out evenly: a step's rows to ranks, and a rank's rows to microbatches.

Longest-processing-time first (Graham 1969) puts the costliest thing left into the share that has least. It is off by
up to a third of the mean, so swaps follow: as long as the costliest share gets cheaper by giving one thing away, or by
exchanging it for one of another share, it does.
"""

import heapq
from collections.abc import Sequence

import numpy as np

MAX_SWAPS_PER_SHARE = 8


def share_out(costs: Sequence[float] | np.ndarray, shares: int) -> list[np.ndarray]:
    """Things, by their number, in `shares` of near-equal summed cost; some are empty where there are fewer things.

    `costs` are positive, [things]. Returns ascending int64 arrays, the same for the same costs on every machine.
    """
    costs = np.asarray(costs, np.float64)
    if shares == 1:
        return [np.arange(len(costs))]
    share_of, loads = np.zeros(len(costs), np.int64), np.zeros(shares)
    lightest = [(0.0, share) for share in range(shares)]  # a heap
    for thing in np.argsort(-costs, kind="stable").tolist():
        load, share = lightest[0]
        share_of[thing], loads[share] = share, load + costs[thing]
        heapq.heapreplace(lightest, (float(loads[share]), share))
    for _ in range(MAX_SWAPS_PER_SHARE * shares if len(costs) else 0):
        if not _improve(costs, share_of, loads):
            break
    ends = np.cumsum(np.bincount(share_of, minlength=shares))
    return np.split(np.argsort(share_of, kind="stable"), ends[:-1])


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
    if min(best_swap, after_gift.min()) >= loads[top] * (1 - 1e-9):
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
