"""The evaluation loss is one exact number: no mean of batches' means, whatever the batch and the number of ranks."""

import math
import time
from typing import Any

import torch

from isotune.checkpoint.unshard import reshard
from isotune.data.batch_schedule import assign_to_ranks
from isotune.data.collate import collate
from isotune.distributed.collectives import gather_by_number, ordered_sum


@torch.no_grad()
def evaluation_loss(trainer: Any) -> dict[str, float]:
    """The token-weighted loss and perplexity of the trainer's evaluation documents; every rank must call it.

    Returns:
        eval_loss in nats per supervised token, eval_perplexity, eval_supervised_tokens, eval_seconds.
    """
    started = time.perf_counter()
    model, process = trainer.model_wrapped, trainer.process
    mode = model.training
    model.eval()
    step = trainer.eval_plan.step(0)
    losses = {}
    for microbatch in assign_to_ranks(step, process.world_size)[process.rank]:
        inputs = trainer._prepare_inputs(collate(trainer.evaluation.documents, microbatch))
        loss = model(**inputs, use_cache=False).loss
        if microbatch.weight:
            losses[microbatch.number] = loss
        trainer.watchdog.progress(f"the evaluation after step {trainer.state.global_step}")
    model.train(mode)
    reshard(model)
    sums = gather_by_number(losses, len(step.microbatches), trainer.args.device)
    loss = ordered_sum(sums) / step.supervised_tokens
    return {
        "eval_loss": loss,
        "eval_perplexity": math.exp(min(loss, 700.0)),
        "eval_supervised_tokens": step.supervised_tokens,
        "eval_seconds": time.perf_counter() - started,
    }
