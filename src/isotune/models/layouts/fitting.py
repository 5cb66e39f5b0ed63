"""Forward passes without gradients that a device has memory for: a batch that is too large is run in halves.

What shares a batch changes rounding only, and no rank waits for another within such a batch unless its model is
sharded. So a rank decides alone, and tries no larger batch again with the same `FittingBatches`.
"""

import contextlib
import gc
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from tqdm import tqdm

from isotune.io.errors import MEMORY, RankError

Item = TypeVar("Item")
Found = TypeVar("Found")

# of cuBLAS, of the driver and of the allocator of CPUs, which have no class of their own
MESSAGES = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory", "DefaultCPUAllocator: can't allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or a CPU's allocator, had no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or any(message in str(error) for message in MESSAGES)


def release_memory() -> None:
    """Give back what nothing refers to any more, so that larger blocks are free."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@dataclass(eq=False)
class FittingBatches:
    """Runs batches, each whole or in the halves that fit."""

    halves: bool = True  # false where another rank waits within a batch
    largest_tokens: float = field(default=math.inf, init=False)  # of a batch of several items; lower after a failure

    def run(
        self,
        items: Sequence[Item],
        tokens: Callable[[Sequence[Item]], int],
        forward: Callable[[Sequence[Item]], Found],
    ) -> Iterator[tuple[Sequence[Item], Found]]:
        """What `forward` returns for the items, or for each of the parts of them that fit, in their order.

        `tokens` are those of some of the items. The allocator's error where one item alone is too large.
        """
        waiting = [items]
        while waiting:
            part = waiting.pop()
            if len(part) < 2 or tokens(part) <= self.largest_tokens:
                try:
                    found = forward(part)
                except RuntimeError as error:
                    if not is_out_of_memory(error) or not self.halves or len(part) < 2:
                        raise
                else:
                    yield part, found
                    continue
                self._shrink(tokens(part))
                release_memory()  # here, where the error no longer refers to what the forward had made
            middle = -(-len(part) // 2)
            waiting += [part[middle:], part[:middle]]

    def _shrink(self, size: int) -> None:
        self.largest_tokens = size // 2
        tqdm.write(
            f"memory      a batch of {size:,} tokens ran out of memory: batches have {size // 2:,} at most from here "
            "on, which changes rounding only",
            file=sys.stderr,
        )


@contextlib.contextmanager
def memory_in_one_sentence(fitting: FittingBatches, remedy: str) -> Iterator[None]:
    """Hold it around batches that are not part of training: what halves did not answer becomes a RankError."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        where = (
            "with one text at a time" if fitting.halves else "in a batch, of which a smaller --batch_size makes less"
        )
        raise RankError(f"the device ran out of memory {where}: {remedy}", prints=True, reason=MEMORY) from error
