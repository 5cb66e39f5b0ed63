"""How far the logits that an exported file gives are from those of the model that was trained."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from isotune.checkpoint.formats.rows import ComparedRows, Row
from isotune.models.classifier import takes_token_types
from isotune.models.finished_run import (
    PARITY_TOLERANCE,
    FinishedRun,
    Parity,
    add_run_adapter,
    compare_logits,
    is_classifier,
    load_run_base,
    load_run_tokenizer,
    load_whole_model,
    settle,
    without_cache,
)


@dataclass(frozen=True)
class FileParity:
    """The parity of an exported file, and what it was measured on and by."""

    parity: Parity
    rows: int
    source: str  # of the rows, in words
    runtime: str  # what ran the file
    place: str  # what is compared at each place

    def __str__(self) -> str:
        found = self.parity
        return (
            f"file: run by {self.runtime} on {self.rows} rows of {self.source}: largest absolute logit difference "
            f"{found.largest_difference:.3g} (tolerance {found.tolerance:.3g}, largest logit "
            f"{found.largest_logit:.3g}); the {self.place} is the same at {found.equal} of {found.compared} places "
            f"({found.equal / found.compared:.1%})"
        )


def trained_model(run: FinishedRun, *, settles: bool = False) -> Any:
    """The model as it was trained, an adapter on its base, with all weights in fp32 on the CPU.

    `settles`: it is that of a checkpoint, whose configuration training has not settled yet; an adapter's base never is.
    """
    if run.is_adapter:
        base = load_run_base(run, torch.device("cpu"), dequantize=True)
        settle(base, load_run_tokenizer(run))
        return add_run_adapter(run, base.float()).eval()
    model = load_whole_model(run, torch.float32).eval()
    if settles:
        settle(model, load_run_tokenizer(run))
    return model


@torch.no_grad()
def logits_of(model: Any, rows: Sequence[Row]) -> list[Tensor]:
    """The logits of each row alone and without padding: float32 [tokens, vocabulary], or [1, classes]."""
    found = list[Tensor]()
    for row in rows:
        ids = torch.tensor([row.ids])
        given: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **without_cache(model)}
        if row.first_type is not None and takes_token_types(model):
            given["token_type_ids"] = (torch.arange(len(row.ids)) >= row.first_type).long()[None]
        found.append(model(**given).logits.flatten(0, -2).float())
    return found


def compare_file(
    run: FinishedRun,
    rows: ComparedRows,
    expected: Sequence[Tensor],
    actual: Sequence[Tensor],
    *,
    dtype: torch.dtype,
    runtime: str,
) -> FileParity:
    """The parity of the logits that a file gave of some rows; `dtype` is that of its weights."""
    tolerance = PARITY_TOLERANCE.get(dtype, PARITY_TOLERANCE[torch.float32])
    parity = compare_logits(torch.cat(list(expected)), torch.cat(list(actual)), tolerance)
    place = "likeliest class" if is_classifier(run) else "greedy token"
    return FileParity(parity, len(rows.rows), rows.source, runtime, place)
