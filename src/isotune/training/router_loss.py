"""The routers' load-balancing loss of an update: exact over its whole global batch, by a look ahead.

The counts of all tokens of the update have to be known before the first backward, so each microbatch runs forward once
more, without a graph and with the same dropout. With them, the gradient of a microbatch is its part of the gradient
of the whole batch's loss, and neither microbatches nor ranks change it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from isotune.compat.torch import in_float64
from isotune.data.batch_schedule import Step
from isotune.distributed.ranks import gather_vectors
from isotune.training.router_balance import RouterBalance


@dataclass(eq=False)
class RouterLoss:
    """Adds `coefficient` times the balancing loss of the global batch to the loss of its microbatches."""

    coefficient: float
    balance: RouterBalance
    value: float = field(default=0.0, init=False)  # of the global batch, before the coefficient
    _choices: Tensor | None = field(default=None, init=False)  # fp32 [experts], of the global batch
    _tokens: float = field(default=1.0, init=False)  # of the global batch, once a layer

    def look_ahead(
        self,
        step: Step,
        microbatches: Sequence[dict[str, Any]],
        outputs: Callable[[dict[str, Any]], Any],
        device: torch.device,
    ) -> None:
        """Count over all ranks, before the update; every rank must call it, as `Task.begin`."""
        experts, own = self.balance.experts, dict[int, Tensor]()
        for microbatch in microbatches:
            found = outputs(microbatch)
            if found is None:
                continue
            made = found.router_logits
            choices, tokens = self.balance.choices(made), self.balance.tokens(made)
            probabilities = self.balance.probabilities(made)
            if microbatch["weight"]:
                parts = [in_float64(part) for part in (choices, probabilities, choices.new_full((1,), tokens))]
                own[microbatch["number"]] = torch.cat(parts)
        # each number comes from one rank and whole ones are exact in float64, so no launch changes the sums
        table = gather_vectors(own, len(step.microbatches), 2 * experts + 1, device)
        total = table.sum(dim=0)
        self._choices, self._tokens = total[:experts].float().to(device), float(total[-1])
        self.value = float(self.balance.loss(total[:experts], total[experts:-1], self._tokens))

    def part(self, router_logits: tuple[Tensor, ...]) -> Tensor:
        """What a microbatch adds to the coefficient times the loss, fp32 []; before a look ahead it is zero."""
        probabilities = self.balance.probabilities(router_logits)
        if self._choices is None:  # a microbatch that is tried before the first step
            return 0.0 * probabilities.sum()
        return self.coefficient * self.balance.loss(self._choices, probabilities, self._tokens)
