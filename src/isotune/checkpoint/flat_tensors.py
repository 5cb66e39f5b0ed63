"""The checkpoint format: every tensor of a training state is saved flat, and each rank writes the slice that it owns.

A parameter of a plain model, a DTensor sharded by rows, a fragment of ZeRO-1/2's flat groups and a partition of ZeRO-3
have one thing in common: flattened, a rank's part is contiguous. torch.distributed.checkpoint writes the slices to
safetensors files, and reshards them for any other engine and number of ranks.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from isotune.compat.torch import wrapper_tensor

FILE_BYTES = 2**30  # of the whole tensors in one file of a rank: the writer holds a file in memory before it writes


class FlatTensor(Tensor):
    """This rank's contiguous part of a tensor of `size` elements, as torch.distributed.checkpoint wants it.

    A tensor subclass without data of its own: `local` holds the elements [offset, offset + len(local)), which may be
    none; reading fills it in place, on its device. A rank has at most one part of a tensor, because a file holds one
    tensor of a name.
    """

    local: Tensor
    offset: int

    @staticmethod
    def __new__(cls: "type[FlatTensor]", local: Tensor, offset: int, size: int) -> "FlatTensor":
        assert local.ndim == 1 and offset >= 0 and offset + local.numel() <= size
        wrapper = wrapper_tensor(cls, size, local.dtype)
        wrapper.local, wrapper.offset = local, offset
        return wrapper

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """A FlatTensor takes part in no computation."""
        raise NotImplementedError(f"{operation} on a FlatTensor: use its local part")

    @classmethod
    def whole(cls, tensor: Tensor) -> "FlatTensor":
        """A whole contiguous tensor, sharing its memory."""
        return cls(tensor.detach().view(-1), 0, tensor.numel())

    def _chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size([self.offset]), torch.Size([self.local.numel()]))

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        """What this rank writes."""
        if not self.local.numel():
            return []
        data = TensorWriteData(
            chunk=self._chunk(), properties=TensorProperties(dtype=self.dtype), size=torch.Size([self.numel()])
        )
        return [WriteItem(MetadataIndex(fqn, torch.Size([self.offset])), WriteItemType.SHARD, tensor_data=data)]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        """What this rank reads."""
        return [self._chunk()] if self.local.numel() else []

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        """The memory of the slice."""
        assert index.offset is None or tuple(index.offset) == (self.offset,)
        return self.local


def share_of(tensor: Tensor, rank: int, world_size: int) -> FlatTensor:
    """The slice that a rank writes of a tensor that every rank has whole, sharing its memory; lengths differ by 1."""
    flat = tensor.detach().reshape(-1)
    start, stop = (flat.numel() * r // world_size for r in (rank, rank + 1))
    return FlatTensor(flat[start:stop], start, flat.numel())


def host_copy(tensors: Mapping[str, FlatTensor]) -> dict[str, FlatTensor]:
    """Copy the tensors to host memory; training waits for this part of a checkpoint only."""
    copies: dict[str, FlatTensor] = {}
    for name, tensor in tensors.items():
        local = tensor.local.detach()
        waits_later = local.is_cuda  # of other devices, such as MPS, nothing below waits for the copies
        copies[name] = FlatTensor(local.to("cpu", copy=True, non_blocking=waits_later), tensor.offset, tensor.numel())
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return copies


def write_tensors(folder: Path, tensors: Mapping[str, FlatTensor], group: dist.ProcessGroup | None) -> None:
    """Write every rank's slices to safetensors files in `folder`, one or more per rank, synced to the disk.

    Collective over `group`; every rank passes the same names in the same order. Without a group, one process. Every
    rank raises torch's CheckpointException where any could not write, and RuntimeError where slices leave a gap.
    """
    writer = HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=_files(tensors), save_distributed=True)
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch warns that one process is not distributed
        saved = cast(Any, dcp).save(
            dict(tensors), storage_writer=writer, planner=planner, process_group=group, no_dist=group is None
        )
    written = saved.state_dict_metadata
    for name, tensor in tensors.items():
        # torch 2.13 refuses slices that overlap, and not those that leave a gap
        covered = sum(chunk.sizes[0] for chunk in written[name].chunks) if name in written else 0
        if covered != tensor.numel():
            raise RuntimeError(f"{name} has {tensor.numel()} elements, and the ranks own {covered} of them")


def _files(tensors: Mapping[str, FlatTensor]) -> dict[str, int]:
    """The number of the file that each tensor goes to."""
    files: dict[str, int] = {}
    number, filled = 1, 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.dtype.itemsize
        if filled and filled + size > FILE_BYTES:
            number, filled = number + 1, 0
        files[name] = number
        filled += size
    return files


def written_by(folder: Path, rank: int) -> list[Path]:
    """The files that `write_tensors` wrote on a rank."""
    return sorted(folder.glob(f"shard-{rank + 1:05d}-*.safetensors"))


def read_tensors(folder: Path, tensors: Mapping[str, FlatTensor]) -> None:
    """Fill the local part of every tensor from `folder`, however it was sliced when it was written. Not collective.

    Raises RuntimeError where a tensor is missing or has another size.
    """
    wanted: dict[str, Any] = {name: tensor for name, tensor in tensors.items() if tensor.local.numel()}
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            reader = HuggingFaceStorageReader(str(folder))
            cast(Any, dcp).load(wanted, storage_reader=reader, planner=planner, no_dist=True)
        except CheckpointException as failure:  # a BaseException in torch 2.13
            cause = next(iter(failure.failures.values()))[0]
            raise RuntimeError(f"{folder}: {cause}") from cause


def read_whole(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The named tensors of `folder`, whole, on the CPU, in the files' dtypes; raises as `read_tensors` does."""
    tensors = stored(folder)
    whole = {name: torch.empty(shape, dtype=tensors[name][1]) for name, shape in shapes.items()}
    read_tensors(folder, {name: FlatTensor.whole(tensor) for name, tensor in whole.items()})
    return whole


def stored(folder: Path) -> dict[str, tuple[int, torch.dtype]]:
    """Elements and dtype of every tensor in `folder`, by name."""
    metadata: Any = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: (tensor.size[0], tensor.properties.dtype) for name, tensor in metadata.items()}
