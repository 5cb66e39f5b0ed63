"""The batch schedule: what every optimizer update of a run sees, the same on any hardware.

    epoch        rows, shuffled by (seed, epoch)
    step         the next `global_batch_size` rows: one optimizer update
    microbatch   some rows of the step, numbered from 0: what one forward pass sees

A schedule is a pure function of the prepared documents, the recipe and the seed. Which rows share a microbatch changes
rounding only. Where bits are promised, it is decided without knowing the ranks, and `assign_to_ranks` shares whole
microbatches out. Elsewhere the rows of a step are shared out first, so that every rank computes as much as the others.
For a model that pads, the documents of a step are, each by itself, and those of similar length share a microbatch.
`collate` makes the tensors of a microbatch.
"""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NotRequired, TypedDict, cast

import numpy as np
import torch
from torch import Tensor

from isotune.data.balance import MANY, deal, share_out
from isotune.data.documents import FIRST_TYPE, Documents, Rows, starts_of, sums_of
from isotune.data.packing import pack

# Attention costs as much as all matrix products together at about 12 x hidden size tokens (24 d^2 multiplications a
# token and layer against 2 d a causal neighbour); 12,288 is that length for a hidden size of 1,024.
ATTENTION_PARITY_TOKENS = 12_288
LAYOUT = 2  # raised where steps are laid out otherwise: since 2 the large ones (`StepSchedule.is_large`) are


@dataclass(frozen=True)
class Microbatch:
    """What one forward pass sees: whole documents, one after the other, without padding."""

    number: int  # within the step
    documents: tuple[int, ...]
    tokens: int
    supervised_tokens: int
    cost: float
    rank: int | None = None  # that runs it; None where `assign_to_ranks` decides
    weight: float = 1.0  # 0 where a rank runs the forward only because the other ranks still communicate


@dataclass(frozen=True, eq=False)
class LaidMicrobatches:
    """The microbatches of a step as arrays; each is made when it is asked for.

    A launch of thousands of ranks has thousands a step. Every rank lays all of them out, and runs a few.
    """

    documents: np.ndarray  # int64, those of microbatch 0 first
    starts: np.ndarray  # int64 [microbatches + 1], places in `documents`; no microbatch is empty
    tokens: np.ndarray  # int64 [microbatches]
    supervised_tokens: np.ndarray  # int64 [microbatches]
    costs: np.ndarray  # float64 [microbatches]
    ranks: np.ndarray | None = None  # int64 [microbatches]; None where `assign_to_ranks` decides

    def __len__(self) -> int:
        return len(self.costs)

    def __getitem__(self, number: int) -> Microbatch:
        number = range(len(self))[number]
        return Microbatch(
            number=number,
            documents=tuple(self.documents[self.starts[number] : self.starts[number + 1]].tolist()),
            tokens=int(self.tokens[number]),
            supervised_tokens=int(self.supervised_tokens[number]),
            cost=float(self.costs[number]),
            rank=None if self.ranks is None else int(self.ranks[number]),
        )

    def __iter__(self) -> Iterator[Microbatch]:
        return map(self.__getitem__, range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LaidMicrobatches) and tuple(self) == tuple(other)


@dataclass(frozen=True)
class Step:
    """One optimizer update: its microbatches and the global counts that its loss is divided by."""

    number: int
    epoch: int
    microbatches: LaidMicrobatches

    @property
    def supervised_tokens(self) -> int:
        """The denominator of the loss: targets in the whole global batch, over all ranks; a label is one target."""
        return int(self.microbatches.supervised_tokens.sum())

    @property
    def input_tokens(self) -> int:
        """Tokens in the global batch, over all ranks."""
        return int(self.microbatches.tokens.sum())

    @property
    def documents(self) -> int:
        """Documents in the global batch."""
        return len(self.microbatches.documents)


class StepSchedule:
    """All steps of a run, addressed by their number; nothing is drawn from a shared random stream.

    The last update of an epoch may see fewer than `global_batch_size` rows; nothing is dropped. `shuffle` is off for
    evaluation, where the order of the rows has no meaning.
    """

    def __init__(
        self,
        documents: Documents,
        rows: Rows,
        *,
        global_batch_size: int,
        microbatch_tokens: int,  # the most that one forward pass may see, at least the longest row
        ranks: int | None = None,  # that a step's rows are shared out to; None: microbatches do not depend on ranks
        padded: bool = False,  # the model fills the documents of a microbatch up to the longest
        seed: int,
        shuffle: bool = True,
    ) -> None:
        assert len(rows) > 0, "empty data is refused before a schedule is made"
        self.rows = rows
        self.global_batch_size = global_batch_size
        self.microbatch_tokens = microbatch_tokens
        self.ranks = ranks
        self.padded = padded
        self.seed = seed
        self.shuffle = shuffle
        self._lengths = documents.lengths
        self._supervised = documents.supervised_counts
        # of what is shared out: the rows, or the documents of a model that pads
        self._tokens = self._lengths if padded else rows.lengths(self._lengths)
        costs = document_costs(self._lengths)
        self._costs = costs if padded else np.add.reduceat(costs[rows.documents], rows.starts[:-1])
        assert self._tokens.max() <= microbatch_tokens, "a row must fit into a microbatch"
        self._order = lru_cache(maxsize=2)(self._shuffled_rows)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer updates that see every row once."""
        return -(-len(self.rows) // self.global_batch_size)

    @property
    def is_large(self) -> bool:
        """Whether `deal` is quick for a step: its rows, or documents that are padded, times the ranks are many."""
        documents = -(-len(self._lengths) // (len(self.rows) * self.rows.epochs)) if self.padded else 1
        return self.global_batch_size * documents * (self.ranks or 0) > MANY

    def _shuffled_rows(self, epoch: int) -> np.ndarray:
        rows = np.arange(len(self.rows))
        if self.shuffle:
            rows = np.random.default_rng((self.seed, epoch)).permutation(len(self.rows))
        return rows + self.rows.of_epoch(epoch)

    def step(self, number: int) -> Step:
        """Step `number`, counted from 0 over the whole run."""
        epoch, within = divmod(number, self.steps_per_epoch)
        rows = self._order(epoch)[within * self.global_batch_size : (within + 1) * self.global_batch_size]
        items, bounds = self._shared_out(self.rows.locate(rows)[1] if self.padded else rows)
        if not self.padded and sums_of(self._tokens[items], bounds).max() <= self.microbatch_tokens:
            ranks = np.flatnonzero(np.diff(bounds))  # a forward for each share that is not empty
            bounds = np.append(bounds[ranks], len(items))
        else:
            shares = np.split(items, bounds[1:-1])
            cut = [self._of_similar_length(share) for share in shares] if self.padded else self._cut(shares)
            ranks = np.repeat(np.arange(len(cut)), list(map(len, cut)))
            groups = [group for share in cut for group in share]
            items, bounds = np.concatenate(groups), starts_of(np.array(list(map(len, groups))))
        return Step(number, epoch, self._laid(items, bounds, None if self.ranks is None else ranks))

    def _shared_out(self, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows or documents, those of the first share first, and where each share starts: int64 [shares + 1]."""
        if self.ranks is None:
            return items, np.array([0, len(items)])
        share_of = deal(self._costs[items], self.ranks, quick=True)
        return items[np.argsort(share_of, kind="stable")], starts_of(np.bincount(share_of, minlength=self.ranks))

    def _laid(self, items: np.ndarray, bounds: np.ndarray, ranks: np.ndarray | None) -> LaidMicrobatches:
        """Groups of rows or documents, which start at `bounds`, as microbatches."""
        documents = items
        if not self.padded:
            starts, documents = self.rows.locate(items)
            bounds = starts[bounds]
        lengths = filled = self._lengths[documents]
        if self.padded:
            filled = np.repeat(np.maximum.reduceat(lengths, bounds[:-1]), np.diff(bounds))
        tokens, supervised, costs = (
            np.add.reduceat(values, bounds[:-1])
            for values in (lengths, self._supervised[documents], document_costs(filled))
        )
        return LaidMicrobatches(documents, bounds, tokens, supervised, costs, ranks)

    def costliest(self, steps: int) -> tuple[Step, Microbatch]:
        """Of the first `steps`, which are all that a run has, or of its rows: what takes most memory, and its step."""
        counted = map(self.step, range(min(steps, self.steps_per_epoch * self.rows.epochs)))
        return max(
            ((step, microbatch) for step in counted for microbatch in step.microbatches),
            key=lambda pair: self.memory_order(pair[1]),
        )

    def memory_order(self, microbatch: Microbatch) -> tuple[int, float]:
        """Larger for a microbatch that takes more memory; where the model pads, tokens alone do not tell."""
        return 0 if self.padded else microbatch.tokens, microbatch.cost

    def _cut(self, shares: list[np.ndarray]) -> list[list[np.ndarray]]:
        """Each share of rows in groups of near-equal cost that the memory allows, as few and as many as in the others.

        Where best-fit needs fewer groups than equal cost does, it decides.
        """
        count = max(-(-int(self._tokens[share].sum()) // self.microbatch_tokens) for share in shares)
        cut = [self._equal(share, count) for share in shares]
        if all(cut):
            return cut
        packed = [pack(self._tokens[share], self.microbatch_tokens, seed=self.seed) for share in shares]
        count = max(map(len, packed))
        return [
            self._equal(share, count) or [share[np.sort(fewest[group])] for group in range(len(fewest))]
            for share, fewest in zip(shares, packed, strict=True)
        ]

    def _equal(self, rows: np.ndarray, count: int) -> list[np.ndarray]:
        """`rows` in at most `count` groups of near-equal cost; none where one of them has too many tokens."""
        groups = [rows[group] for group in share_out(self._costs[rows], count) if len(group)]
        fit = all(self._tokens[group].sum() <= self.microbatch_tokens for group in groups)
        return groups if fit else []

    def _of_similar_length(self, documents: np.ndarray) -> list[np.ndarray]:
        """Documents, longest first, in groups that the memory allows with each filled up to its group's longest."""
        ordered = documents[np.argsort(-self._tokens[documents], kind="stable")]
        groups: list[np.ndarray] = []
        while len(ordered):
            count = self.microbatch_tokens // int(self._tokens[ordered[0]])
            groups.append(ordered[:count])
            ordered = ordered[count:]
        return groups


def document_costs(lengths: np.ndarray) -> np.ndarray:
    """What the forward of each document of these lengths, int64 [documents], costs: in tokens of matrix products."""
    return lengths * (1 + lengths / ATTENTION_PARITY_TOKENS)


def microbatch_cost(lengths: np.ndarray) -> float:
    """The same of all documents together."""
    return float(document_costs(lengths).sum())


def assign_to_ranks(step: Step, world_size: int) -> list[list[Microbatch]]:
    """Give each rank its share of a step: near-equal cost, and exactly equal numbers of microbatches.

    Where the schedule has not decided: longest-processing-time first, with at most ceil(n / world_size) microbatches a
    rank. A rank with fewer than others also gets the step's cheapest microbatch with weight zero, because sharded
    engines communicate within every forward.
    """
    rank_of = _rank_of(step.microbatches, world_size)
    return [_share(step.microbatches, rank_of, rank) for rank in range(world_size)]


def share_of_rank(step: Step, world_size: int, rank: int) -> list[Microbatch]:
    """The share of one rank, which `assign_to_ranks` gives it."""
    return _share(step.microbatches, _rank_of(step.microbatches, world_size), rank)


def _rank_of(laid: LaidMicrobatches, world_size: int) -> np.ndarray:
    """The rank of each microbatch, int64 [microbatches]."""
    if laid.ranks is not None:
        return laid.ranks
    rank_of, room = np.zeros(len(laid), np.int64), -(-len(laid) // world_size)
    taken = [0] * world_size
    by_load = [(0.0, rank) for rank in range(world_size)]  # a heap of the ranks with room
    for number in np.argsort(-laid.costs, kind="stable").tolist():
        load, rank = by_load[0]
        rank_of[number] = rank
        taken[rank] += 1
        if taken[rank] < room:
            heapq.heapreplace(by_load, (load + float(laid.costs[number]), rank))
        else:
            heapq.heappop(by_load)
    return rank_of


def _share(laid: LaidMicrobatches, rank_of: np.ndarray, rank: int) -> list[Microbatch]:
    own = np.flatnonzero(rank_of == rank).tolist()
    idle = int(np.bincount(rank_of).max()) - len(own)
    cheapest = laid[int(laid.costs.argmin())]
    return [laid[number] for number in own] + [replace(cheapest, supervised_tokens=0, weight=0.0)] * idle


class PackedInputs(TypedDict):
    """The keyword arguments of a packed forward pass; a classifier computes its positions and has not the last two."""

    input_ids: torch.Tensor  # int64 [1, tokens]
    cu_seq_lens_q: torch.Tensor  # int32 [documents + 1], where each document begins and the last ends
    cu_seq_lens_k: torch.Tensor  # the same
    max_length_q: int  # tokens of the longest document
    max_length_k: int  # the same
    # int64: the classes [documents], or the supervised tokens [supervised tokens]; float32: the numbers of a regression
    # [documents], or the labels [documents, labels], each 0 or 1
    targets: torch.Tensor
    position_ids: NotRequired[torch.Tensor]  # int64 [1, tokens]; positions restart in every document
    supervised_positions: NotRequired[torch.Tensor]  # int64 [supervised tokens]; they predict `targets`
    token_type_ids: NotRequired[torch.Tensor]  # int64 [1, tokens]; 0 in the first text of a pair, 1 in the second


def collate(documents: Documents, numbers: Sequence[int]) -> PackedInputs:
    """Lay the documents of these numbers end to end, with their targets.

    The token at position p is predicted from position p - 1, so `supervised_positions` are the places before the
    supervised tokens. A document's first token is never supervised, hence no position reaches into a neighbour.
    """
    chosen = np.array(numbers)
    starts, tokens = documents.locate(chosen)
    lengths = np.diff(starts)
    input_ids = torch.tensor(documents.input_ids[tokens], dtype=torch.int64)
    bounds = torch.tensor(starts, dtype=torch.int32)
    if documents.has_labels:
        own = np.asarray(documents.labels[chosen])
        targets = torch.tensor(own, dtype=torch.int64 if own.dtype.kind == "i" else torch.float32)
        supervised = None
    else:
        supervised = torch.tensor(np.flatnonzero(documents.supervised[tokens]))
        targets = input_ids[supervised]
    inputs = PackedInputs(
        input_ids=input_ids[None],
        cu_seq_lens_q=bounds,
        cu_seq_lens_k=bounds,
        max_length_q=int(lengths.max()),
        max_length_k=int(lengths.max()),
        targets=targets,
    )
    if supervised is not None:
        inputs["supervised_positions"] = supervised - 1
        inputs["position_ids"] = torch.tensor(np.arange(len(tokens)) - np.repeat(starts[:-1], lengths))[None]
    if FIRST_TYPE in documents.columns:
        first = np.repeat(starts[:-1] + documents.columns[FIRST_TYPE][chosen], lengths)
        inputs["token_type_ids"] = torch.tensor(np.arange(len(tokens)) >= first, dtype=torch.int64)[None]
    return inputs


def to_device(inputs: PackedInputs, device: torch.device) -> PackedInputs:
    """The inputs on a device: on a GPU by one copy from pinned memory, for which the computation does not wait."""
    return to_device_together([inputs], device)[0]


def to_device_together(several: Sequence[PackedInputs], device: torch.device) -> list[PackedInputs]:
    """The inputs of several microbatches on a device, by one copy for all of them."""
    own = [
        {name: v for name, v in inputs.items() if isinstance(v, Tensor) and name != "cu_seq_lens_k"}
        for inputs in several
    ]
    tensors = [tensor for named in own for tensor in named.values()]
    if device.type == "cuda" and tensors:
        flat = torch.cat([_as_integers(tensor).reshape(-1) for tensor in tensors]).pin_memory()
        split = torch.split(flat.to(device, non_blocking=True), [tensor.numel() for tensor in tensors])
    else:
        split = [tensor.to(device) for tensor in tensors]
    parts = iter([_of_integers(p.view(t.shape), t.dtype) for t, p in zip(tensors, split, strict=True)])
    moved = [{name: next(parts) for name in named} for named in own]
    return [
        cast(PackedInputs, {**inputs, **named, "cu_seq_lens_k": named["cu_seq_lens_q"]})
        for inputs, named in zip(several, moved, strict=True)
    ]


def _as_integers(tensor: Tensor) -> Tensor:
    """Any tensor as int64, with the bits of a float32 number in place of its value."""
    return (tensor.view(torch.int32) if tensor.dtype == torch.float32 else tensor).long()


def _of_integers(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A moved tensor in its own dtype again."""
    if dtype == torch.float32 and tensor.dtype == torch.int64:
        return tensor.to(torch.int32).view(torch.float32)
    return tensor.to(dtype)
