"""The load-balancing loss of a mixture of experts, in parts that can be added up over microbatches and ranks.

With c_e the times that expert e was chosen, p_e the sum of its probabilities and n the tokens, all over the layers and
the whole global batch, it is E sum_e (c_e / n) (p_e / n), as in transformers (Switch Transformer, eq. 4 to 6) for one
forward. It is a product of two means, so a mean of microbatches' losses is another number. The counts have no gradient:
once they are known, the rest is a sum over tokens.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from isotune.compat.peft import base_model_of
from isotune.io.errors import UserError, first_line
from isotune.models.isolation import packed_inputs

TOLERANCE = 1e-5  # relative, of the stock loss in fp32; 16 bits round a router's probabilities
ROUNDED = 2e-2


@dataclass(frozen=True)
class RouterBalance:
    """How many experts a model has, and how many of them a token is sent to."""

    experts: int
    chosen: int

    def choices(self, router_logits: tuple[Tensor, ...]) -> Tensor:
        """How often each expert was chosen, int64 [experts], in one forward: [tokens, experts] of each layer."""
        every = torch.arange(self.experts, device=router_logits[0].device)
        chosen = [self._probabilities(logits).detach().topk(self.chosen, dim=-1).indices for logits in router_logits]
        return torch.stack([(own[..., None] == every).sum(dim=(0, 1)) for own in chosen]).sum(dim=0)

    def probabilities(self, router_logits: tuple[Tensor, ...]) -> Tensor:
        """The sum of each expert's probabilities, fp32 [experts], which carries the gradient."""
        total = torch.zeros(self.experts, device=router_logits[0].device)
        for logits in router_logits:
            total = total + self._probabilities(logits).sum(dim=0)
        return total

    def tokens(self, router_logits: tuple[Tensor, ...]) -> int:
        """Tokens times layers."""
        return sum(logits.numel() // self.experts for logits in router_logits)

    def _probabilities(self, logits: Tensor) -> Tensor:
        return torch.softmax(logits.reshape(-1, self.experts).float(), dim=-1)

    def loss(self, choices: Tensor, probabilities: Tensor, tokens: float) -> Tensor:
        """The loss of such sums, or with the choices and tokens of a whole batch the part that `probabilities` add."""
        return self.experts * (choices / tokens * probabilities).sum() / tokens

    def of_forward(self, router_logits: tuple[Tensor, ...]) -> Tensor:
        """The loss of one forward alone, as transformers has it."""
        return self.loss(self.choices(router_logits), self.probabilities(router_logits), self.tokens(router_logits))

    @classmethod
    def of(cls, model: Any) -> "RouterBalance":
        """That of an installed causal model, held to the loss that its own forward returns.

        UserError where the model has none, or another one.
        """
        base = base_model_of(model)
        config = base.config.get_text_config()
        kind = config.model_type
        numbers = [getattr(base, name, getattr(config, name, None)) for name in ("num_experts", "num_experts_per_tok")]
        experts, chosen = numbers[0] or getattr(config, "num_local_experts", None), numbers[1]
        if not experts or not chosen or not hasattr(config, "router_aux_loss_coef"):
            raise UserError(f"router_aux_loss_coef: model type '{kind}' has no balancing loss in transformers")
        found, document = cls(int(experts), int(chosen)), torch.arange(16) % config.vocab_size
        was_training = base.training
        base.eval()
        try:
            with torch.no_grad():
                inputs = packed_inputs([document], base.device, positions=True)
                outputs = base(**inputs, output_router_logits=True)
                ours, stock = float(found.of_forward(outputs.router_logits)), float(outputs.aux_loss)
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(
                f"router_aux_loss_coef: model type '{kind}' does not return what its routers do: {first_line(error)}"
            ) from error
        finally:
            base.train(was_training)
        exact = outputs.router_logits[0].dtype == torch.float32
        if not abs(ours - stock) <= (TOLERANCE if exact else ROUNDED) * abs(stock):
            raise UserError(
                f"router_aux_loss_coef: model type '{kind}' balances its routers in its own way ({stock:.6g} where the "
                f"usual loss is {ours:.6g}): leave it out"
            )
        return found
