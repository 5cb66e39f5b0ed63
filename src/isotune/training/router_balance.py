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

    def sums(self, router_logits: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, int]:
        """Choices and probabilities by expert, int64 and fp32 [experts], and tokens times layers, of one forward.

        `router_logits` are [tokens, experts] of each layer; the probabilities carry the gradient.
        """
        device = router_logits[0].device
        choices = torch.zeros(self.experts, dtype=torch.int64, device=device)
        probabilities = torch.zeros(self.experts, device=device)
        for logits in router_logits:
            own = torch.softmax(logits.reshape(-1, self.experts).float(), dim=-1)
            _, chosen = own.detach().topk(self.chosen, dim=-1)
            choices += (chosen[..., None] == torch.arange(self.experts, device=device)).sum(dim=(0, 1))
            probabilities = probabilities + own.sum(dim=0)
        return choices, probabilities, sum(logits.numel() // self.experts for logits in router_logits)

    def loss(self, choices: Tensor, probabilities: Tensor, tokens: float) -> Tensor:
        """The loss of such sums, or with the choices and tokens of a whole batch the part that `probabilities` add."""
        return self.experts * (choices / tokens * probabilities).sum() / tokens

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
                ours, stock = float(found.loss(*found.sums(outputs.router_logits))), float(outputs.aux_loss)
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
