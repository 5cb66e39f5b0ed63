"""`microbatch_tokens: auto`: as many tokens in one forward pass as fit into the device, up to what makes it faster.

It is chosen once, before the model is loaded, and recorded in recipe.yaml; a run that is resumed keeps it. Where an
update can be repeated it is halved if it was too much (training/failures/out_of_memory.py). Where bits are promised
(exact_gradients) the choice depends on the model, the data and the kind of device alone, whatever the engine, because
exact gradients are rounded once a microbatch; elsewhere also on the engine and on the memory that is free.
"""

from collections.abc import Callable

from isotune.config import RunRecipe
from isotune.io.errors import UserError
from isotune.preflight.request import DDP, DEEPSPEED, FSDP, PLAIN, Launch
from isotune.preflight.resources.memory import Memory, format_bytes

# A GPU is bound by the launches of its kernels below 16,384 tokens; a core of a CPU has enough to do with one row.
MOST_TOKENS_ON_GPU = 32_768
SHARE_OF_MEMORY = 0.9  # beside the margin of the estimate: what the driver and the communication library take


def choose_microbatch_tokens(
    recipe: RunRecipe, launch: Launch, limit: int | None, estimate: Callable[[RunRecipe, Launch], Memory]
) -> tuple[int, Memory | None]:
    """The number of tokens, and the memory that `estimate` says of it; on CPU, without a `limit`, a row and None.

    `limit` is in bytes of a process, and the size that of `launch_that_decides`. UserError where an engine that
    communicates within a microbatch, and so cannot try a smaller one after an error, has no room for it.
    """
    if limit is None:
        return recipe.max_seq_length, None
    sizes = [recipe.max_seq_length]
    while 2 * sizes[-1] <= MOST_TOKENS_ON_GPU:
        sizes.append(2 * sizes[-1])
    decides, chosen = launch_that_decides(recipe, launch), sizes[0]
    for size in reversed(sizes):
        if estimate(recipe.with_values(microbatch_tokens=size), decides).total <= SHARE_OF_MEMORY * limit:
            chosen = size
            break
    found = estimate(recipe.with_values(microbatch_tokens=chosen), launch)
    if found.total > SHARE_OF_MEMORY * limit and launch.engine in (DEEPSPEED, FSDP):
        size = f"one row of {chosen} tokens (max_seq_length)" if chosen == sizes[0] else f"{chosen} tokens"
        raise UserError(
            f"microbatch_tokens: {size} takes {format_bytes(found.total)} on a process under {launch.in_words}, which "
            f"has {format_bytes(limit)}: `isotune plan` says which changes fit"
        )
    return chosen, found


def launch_that_decides(recipe: RunRecipe, launch: Launch) -> Launch:
    """The launch whose memory counts: a plain process where bits are promised on any number of processes.

    Also under an engine that shards, whose bits are those of a plain process: where that has no room, it is a row.
    """
    exact = recipe.sums_exactly(plain_or_ddp=launch.engine in (PLAIN, DDP))
    return Launch(PLAIN, 1, launch.name) if exact else launch
