"""The start-up self-test: perturb one document of a packed row, and look at its neighbours.

Packing without isolation changes every logit and warns of nothing (OPT's causal mask ignores position_ids), so a run
measures it on the very model that it is about to train, and refuses to start when there is a leak.
"""

from dataclasses import asdict, dataclass

import torch
from torch import nn

from isotune.io.errors import RunFault

LENGTHS = (9, 17, 12)
ALONE_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}


@dataclass(frozen=True)
class IsolationReport:
    """What the self-test saw, for environment.json.

    `leak` is the largest change of a logit in a document whose neighbour was replaced; it must be 0.
    `packed_against_alone` is the largest difference to the same document run alone, relative to the largest logit.
    `loss_against_logits` is the relative difference of the supervised loss to cross-entropy of the plain logits.
    """

    leak: float
    packed_against_alone: float
    loss_against_logits: float

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return asdict(self)


@torch.no_grad()
def check_isolation(
    model: nn.Module, vocabulary: int, device: torch.device, dtype: torch.dtype, *, classifier: bool = False
) -> IsolationReport:
    """Run three random documents packed, with the middle one replaced, and each alone.

    Args:
        model: as it will be trained, wrapped and patched; put back into its mode afterwards.
        vocabulary: token ids are drawn below it.
        device: where the model lies.
        dtype: of its matrix products, which decides how far rounding may go.
        classifier: the model gives logits for each document, not for each token.

    Raises:
        RunFault: a document saw its neighbour, or the loss is not that of the logits.
    """
    logits_of, losses_of = (_class_logits, _class_losses) if classifier else (_logits, _losses)
    generator = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(min(8, vocabulary // 2), vocabulary, (n,), generator=generator)  # noqa: E731
    documents = [draw(n) for n in LENGTHS]
    replaced = [documents[0], draw(LENGTHS[1]), documents[2]]
    mode = model.training
    model.eval()
    try:
        together = logits_of(model, documents, device)
        perturbed = logits_of(model, replaced, device)
        alone = [logits_of(model, [document], device)[0] for document in documents]
        loss, reference = losses_of(model, documents, together, device)
    finally:
        model.train(mode)
    leak = max((together[i] - perturbed[i]).abs().max().item() for i in (0, 2))
    largest = max(logits.abs().max().item() for logits in alone)
    apart = max((a - b).abs().max().item() for a, b in zip(together, alone, strict=True)) / max(largest, 1e-6)
    off = abs(loss - reference) / max(abs(reference), 1e-6)
    report = IsolationReport(leak, apart, off)
    if not leak == 0.0:
        raise RunFault(
            f"packed documents see each other: replacing one changed its neighbours' logits by {leak:.3g}; "
            "nothing was trained. Use packing: false or report this model type"
        )
    if not (apart <= ALONE_TOLERANCE[dtype] and off <= ALONE_TOLERANCE[dtype]):
        raise RunFault(
            f"a packed document is not the same as the document alone (relative difference {apart:.3g}, loss "
            f"{off:.3g}); nothing was trained. Report this model type"
        )
    return report


def _inputs(documents: list[torch.Tensor], device: torch.device) -> dict:
    bounds = torch.tensor([0, *torch.tensor([len(d) for d in documents]).cumsum(0)], dtype=torch.int32, device=device)
    longest = max(len(d) for d in documents)
    return {
        "input_ids": torch.cat(documents)[None].to(device),
        "position_ids": torch.cat([torch.arange(len(d)) for d in documents])[None].to(device),
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
        "use_cache": False,
    }


def _logits(model: nn.Module, documents: list[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    logits = model(**_inputs(documents, device)).logits[0].float()
    return list(logits.split([len(d) for d in documents]))


def _losses(model: nn.Module, documents: list, logits: list, device: torch.device) -> tuple[float, float]:
    inputs = _inputs(documents, device)
    starts = inputs["cu_seq_lens_q"][:-1].long()
    targets = torch.ones(inputs["input_ids"].shape[1], dtype=torch.bool, device=device)
    targets[starts] = False
    positions = targets.nonzero()[:, 0]
    loss = model(**inputs, supervised_positions=positions - 1, targets=inputs["input_ids"][0, positions]).loss
    reference = sum(
        torch.nn.functional.cross_entropy(one[:-1], document[1:].to(device), reduction="sum")
        for one, document in zip(logits, documents, strict=True)
    )
    return float(loss), float(reference)


def _class_inputs(documents: list[torch.Tensor], device: torch.device) -> dict:
    inputs = _inputs(documents, device)
    del inputs["position_ids"]  # the classifier counts them itself
    return inputs


def _class_logits(model: nn.Module, documents: list[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    return list(model(**_class_inputs(documents, device)).logits.float())


def _class_losses(model: nn.Module, documents: list, logits: list, device: torch.device) -> tuple[float, float]:
    targets = torch.zeros(len(documents), dtype=torch.int64, device=device)
    loss = model(**_class_inputs(documents, device), targets=targets).loss
    reference = sum(-torch.log_softmax(one, dim=-1)[0] for one in logits)
    return float(loss), float(reference)
