"""Evaluation during training: each microbatch of the evaluation documents once, on whichever rank has it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn

from isotune.checkpoint.unshard import reshard
from isotune.data.batch_schedule import Microbatch
from isotune.distributed.watchdog import Watchdog
from isotune.training.step_loader import EvaluationLoader


@dataclass(frozen=True)
class EvaluationRun:
    """One evaluation.

    Attributes:
        model: as it trains, wrapped by its engine.
        loader: this rank's microbatches.
        device: where the model computes.
        watchdog: told of every microbatch.
        global_step: optimizer updates done.
    """

    model: nn.Module
    loader: EvaluationLoader
    device: torch.device
    watchdog: Watchdog
    global_step: int

    @torch.no_grad()
    def outputs(self) -> Iterator[tuple[Microbatch, Any]]:
        """Each microbatch of this rank with what the model returns for it, in evaluation mode.

        A microbatch of weight 0 keeps a rank in step with the others: its outputs count nowhere.
        """
        was_training = self.model.training
        self.model.eval()
        for microbatch, inputs in self.loader:
            yield microbatch, self.model(**send_to_device(inputs, self.device), use_cache=False)
            self.watchdog.progress(f"the evaluation after step {self.global_step}")
        self.model.train(was_training)
        reshard(self.model)
