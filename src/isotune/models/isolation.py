"""Self-test before training: replace one document of a packed row, and compare the logits of its neighbours.

Packing without isolation changes every logit without a warning (OPT's causal mask ignores position_ids), and so does a
layer that draws random numbers for a row instead of for its documents. So a run measures both on the model that it is
about to train, in evaluation and in training mode, and does not start where there is a leak.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from isotune.compat.torch import TorchDispatchMode
from isotune.config.task_types import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from isotune.io.errors import RunFault
from isotune.models.document_dropout import training_microbatch
from isotune.models.document_keys import MicrobatchDocuments
from isotune.models.layouts.layout import restore_attention_type

LENGTHS = (9, 17, 12)
DRAWS = frozenset({"exponential_", "uniform_", "normal_", "rand", "randn", "rand_like", "randn_like", "bernoulli"})
ALONE_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
# A mixture of experts multiplies the tokens of all documents that chose an expert at once, in a product whose shape,
# and so whose rounding, depends on the neighbours: relative to the largest logit.
EXPERTS_TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 2e-3}


@torch.no_grad()
def check_isolation(
    model: nn.Module,
    vocabulary: int,
    device: torch.device,
    dtype: torch.dtype,
    *,
    classifier: bool = False,
    padded: bool = False,
    task_type: str = SINGLE_LABEL,
) -> dict[str, float]:
    """Run three random documents packed, packed with the middle one replaced, and each alone; without and with dropout.

    `model` is as it will be trained, wrapped and patched, with token ids below `vocabulary` and matrix products in
    `dtype`, on which the tolerance depends; that of a `classifier` has logits per document, not per token, and may be
    `padded` inside, and has the loss of its `task_type`.

    Returns for environment.json the largest change of a logit in a document whose neighbour was replaced, 0 (beyond the
    rounding of experts); the largest difference from the same document in a row of its own, relative to the largest
    logit, and the same with dropout, and to a causal model's stock forward; and the relative difference of the
    supervised loss from the cross-entropy of the plain logits. RunFault where a document depends on its neighbour, a
    token on the ones after it, or the loss is not that of the logits.
    """

    def logits_of(documents: list[torch.Tensor], first: int = 0) -> list[torch.Tensor]:
        lengths = [len(document) for document in documents]
        torch.manual_seed(0)  # of dropout, as every microbatch of a step
        numbers = range(first, first + len(documents))
        with training_microbatch(MicrobatchDocuments(numbers, lengths, padded)):
            logits = model(**packed_inputs(documents, device, positions=not classifier)).logits.float()
        return list(logits) if classifier else list(logits[0].split(lengths))

    def measure() -> tuple[float, float, list[torch.Tensor]]:
        together, perturbed = logits_of(documents), logits_of(replaced)
        alone = [logits_of([document], first)[0] for first, document in enumerate(documents)]
        leak = max((together[i] - perturbed[i]).abs().max().item() for i in (0, 2))
        largest = max(max(logits.abs().max().item() for logits in alone), 1e-6)
        if leak <= rounding * largest:
            leak = 0.0
        error = max((a - b).abs().max().item() for a, b in zip(together, alone, strict=True)) / largest
        return leak, error, together

    rounding = rounding_of_neighbours(model, dtype)
    generator = torch.Generator().manual_seed(0)
    documents = random_documents(vocabulary, LENGTHS, generator)
    replaced = [documents[0], *random_documents(vocabulary, LENGTHS[1:2], generator), documents[2]]
    mode = model.training
    try:
        # the supervised loss last: ZeRO-3 records the order of the modules, and training runs that forward too
        model.train()
        drawing = RowDraws() if rounding else contextlib.nullcontext()
        with drawing:
            dropout_leak, dropout_error, _ = measure()
        model.eval()
        leak, packing_error, together = measure()
        seen, stock_error = (0.0, 0.0) if classifier else _against_stock(model, documents, together, logits_of)
        loss, reference = _losses(model, documents, together, device, task_type if classifier else None)
    finally:
        model.train(mode)
        restore_attention_type(model)
    loss_error = abs(loss - reference) / max(abs(reference), 1e-6)
    if not leak == 0.0:
        raise RunFault(
            f"packed documents see each other: replacing one changed its neighbours' logits by {leak:.3g}; "
            "nothing was trained. Use packing: false or report this model type"
        )
    if not (packing_error <= ALONE_TOLERANCE[dtype] and loss_error <= ALONE_TOLERANCE[dtype]):
        raise RunFault(
            f"a packed document is not the same as the document alone (relative difference {packing_error:.3g}, "
            f"loss {loss_error:.3g}); nothing was trained. Report this model type"
        )
    if not seen <= ALONE_TOLERANCE[dtype]:
        raise RunFault(
            f"a token sees the ones after it (they change its logits by {seen:.3g} of the largest), so this is no "
            "causal language model as it is configured (is_decoder); nothing was trained. Choose a decoder"
        )
    if not stock_error <= ALONE_TOLERANCE[dtype]:
        raise RunFault(
            f"a document's logits differ from those of the model's own forward by {stock_error:.3g} of the largest; "
            "nothing was trained. Report this model type"
        )
    if isinstance(drawing, RowDraws) and drawing.operator is not None:
        raise RunFault(
            f"in training this model's routers draw random numbers for a whole row ({drawing.operator}), so a document "
            "would depend on its neighbours; nothing was trained. Choose a model of another type"
        )
    if not (dropout_leak == 0.0 and dropout_error <= ALONE_TOLERANCE[dtype]):
        raise RunFault(
            f"with dropout, a document depends on its neighbours (leak {dropout_leak:.3g}, relative difference to the "
            f"document alone {dropout_error:.3g}): this model draws random numbers for a row that cannot be given to "
            "its documents; nothing was trained. Set its dropout to 0 in its config.json, or report this model type"
        )
    return {
        "leak": leak,
        "packed_against_alone": packing_error,
        "with_dropout": dropout_error,
        "against_stock": stock_error,
        "loss_against_logits": loss_error,
    }


def rounding_of_neighbours(model: nn.Module, dtype: torch.dtype) -> float:
    """How much a neighbour may change a document's logits, relative to the largest: by the rounding of experts."""
    has_experts = any(name.endswith("experts") for name, _ in model.named_modules())
    return EXPERTS_TOLERANCE[dtype] if has_experts else 0.0


def _against_stock(
    model: nn.Module,
    documents: Sequence[torch.Tensor],
    together: Sequence[torch.Tensor],
    logits_of: Callable[[list[torch.Tensor]], list[torch.Tensor]],
) -> tuple[float, float]:
    """How much a document's last token changes the logits before it, and its logits differ from those of a stock batch.

    Both relative to the largest logit. The mask of such a batch has the model's own direction.
    """
    largest = max(max(logits.abs().max().item() for logits in together), 1e-6)
    *others, last = documents
    changed = last.clone()
    changed[-1] = changed[0] if changed[0] != changed[-1] else changed[1]
    before = logits_of([*others, changed])[-1][:-1]
    seen = (before - together[-1][:-1]).abs().max().item() / largest
    ids = last[None].to(together[-1].device)
    stock: Any = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return seen, (stock.logits[0].float() - together[-1]).abs().max().item() / largest


class RowDraws(TorchDispatchMode):
    """Within it `operator` is the first of torch's that draws more than one number: which no document's dropout calls.

    Routers that jitter or sample do; a few documents rarely show it, because few tokens are near a choice.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operator: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in DRAWS and found.ndim and self.operator is None:
            self.operator = name
        return found


def random_documents(vocabulary: int, lengths: Sequence[int], generator: torch.Generator) -> list[torch.Tensor]:
    """Token ids of documents of so many tokens, int64 [tokens] each, without the first ids, which may be special."""
    return [torch.randint(min(8, vocabulary // 2), vocabulary, (n,), generator=generator) for n in lengths]


def packed_inputs(documents: Sequence[torch.Tensor], device: torch.device, *, positions: bool) -> dict[str, Any]:
    """The arguments of a packed forward pass over token ids [tokens] by document; a classifier has no `positions`."""
    bounds = torch.tensor([0, *torch.tensor([len(d) for d in documents]).cumsum(0)], dtype=torch.int32, device=device)
    longest = max(len(d) for d in documents)
    inputs = {
        "input_ids": torch.cat(list(documents))[None].to(device),
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
        "use_cache": False,
    }
    if positions:
        inputs["position_ids"] = torch.cat([torch.arange(len(d)) for d in documents])[None].to(device)
    return inputs


def _losses(
    model: nn.Module,
    documents: list[torch.Tensor],
    logits: list[torch.Tensor],
    device: torch.device,
    task_type: str | None,
) -> tuple[float, float]:
    """The loss of the packed documents, and the same of their plain logits; a classifier's targets are all 0."""
    inputs = packed_inputs(documents, device, positions=task_type is None)
    if task_type is not None:
        scores = torch.stack(logits)
        targets = torch.zeros(len(logits), dtype=torch.int64, device=device)
        reference = -torch.log_softmax(scores, dim=-1)[:, 0].sum()
        if task_type == REGRESSION:
            targets, reference = targets.float(), scores.square().sum()
        elif task_type == MULTI_LABEL:
            targets, reference = torch.zeros_like(scores), -torch.log1p(-scores.sigmoid()).sum()
        return float(model(**inputs, targets=targets).loss), float(reference)
    supervised = torch.ones(inputs["input_ids"].shape[1], dtype=torch.bool, device=device)
    supervised[inputs["cu_seq_lens_q"][:-1].long()] = False
    positions = supervised.nonzero()[:, 0]
    loss = model(**inputs, supervised_positions=positions - 1, targets=inputs["input_ids"][0, positions]).loss
    reference = sum(
        nn.functional.cross_entropy(scores[:-1], document[1:].to(device), reduction="sum")
        for scores, document in zip(logits, documents, strict=True)
    )
    return float(loss), float(reference)
