"""Tensors written in any split are read in any other split, whole and in place."""

import json
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from tests.launching import start_command

from isotune.checkpoint import flat_tensors
from isotune.checkpoint.flat_tensors import (
    FlatTensor,
    host_copy,
    read_tensors,
    read_whole,
    share_of,
    stored,
    write_tensors,
)

# each of three ranks owns a stretch of each tensor, as the cuts of a case say; some own nothing
WRITER = """
import json, sys, torch, torch.distributed as dist
from pathlib import Path
from isotune.checkpoint.flat_tensors import FlatTensor, write_tensors
rank, folder, cases = int(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=3)
for number, case in enumerate(cases):
    tensors = {}
    for name, (low, high, size) in case.items():
        start, stop = ([0, low, high, size][rank], [0, low, high, size][rank + 1])
        whole = torch.arange(size, dtype=torch.float32) + ord(name)
        tensors[name] = FlatTensor(whole[start:stop], start, size)
    write_tensors(folder / str(number), tensors, dist.group.WORLD)
dist.barrier()  # gloo aborts a rank whose neighbours have gone before it
dist.destroy_process_group()
"""


@st.composite
def cuts(draw) -> list[int]:
    size = draw(st.integers(1, 40))
    low, high = sorted(draw(st.tuples(st.integers(0, size), st.integers(0, size))))
    return [low, high, size]


def expected(name: str, size: int) -> torch.Tensor:
    return torch.arange(size, dtype=torch.float32) + ord(name)


# an example costs three processes: one that fails is told as it is, not made smaller
@settings(
    max_examples=2,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(cases=st.lists(st.fixed_dictionaries(dict.fromkeys("abc", cuts())), min_size=12, max_size=12), data=st.data())
def test_three_ranks_write_any_split_and_any_number_reads_any_other(tmp_path_factory, cases, data):
    folder = tmp_path_factory.mktemp("split")
    ranks = [
        start_command([sys.executable, "-c", WRITER, str(rank), str(folder), json.dumps(cases)]) for rank in range(3)
    ]
    assert [rank.wait(120) for rank in ranks] == [0, 0, 0]
    for number, case in enumerate(cases):
        for name, (_, _, size) in case.items():
            start = data.draw(st.integers(0, size))
            stop = data.draw(st.integers(start, size))
            part = torch.full((stop - start,), -1.0)
            read_tensors(folder / str(number), {name: FlatTensor(part, start, size)})
            assert torch.equal(part, expected(name, size)[start:stop])
            assert stored(folder / str(number))[name] == (size, torch.float32)


def test_every_type_comes_back_bit_for_bit_in_its_shape_and_no_pickle_is_written(tmp_path):
    torch.manual_seed(0)
    tensors = {
        "a": torch.randn(5, 3),
        "b": torch.randn(7).bfloat16(),
        "c": torch.randint(0, 255, (4, 4), dtype=torch.uint8),
        "d": torch.tensor([float("nan"), -0.0, float("inf")]),
    }
    write_tensors(tmp_path, {name: FlatTensor.whole(tensor) for name, tensor in tensors.items()}, None)
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors"}
    read = read_whole(tmp_path, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    for name, tensor in tensors.items():
        assert read[name].shape == tensor.shape
        assert torch.equal(read[name].view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8))


def test_what_every_rank_has_is_written_once_in_even_slices():
    tensor = torch.arange(11.0)
    shares = [share_of(tensor.view(11, 1), rank, 3) for rank in range(3)]
    assert torch.cat([share.local for share in shares]).equal(tensor)
    assert [share.local.numel() for share in shares] == [3, 4, 4]
    assert [share.offset for share in shares] == [0, 3, 7]


def test_a_large_state_is_cut_into_files(tmp_path, monkeypatch):
    monkeypatch.setattr(flat_tensors, "FILE_BYTES", 100)
    tensors = {name: torch.arange(20.0) for name in "abc"}
    write_tensors(tmp_path, {name: FlatTensor.whole(tensor) for name, tensor in tensors.items()}, None)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    assert read_whole(tmp_path, {"b": (20,)})["b"].equal(tensors["b"])


def test_a_slice_that_nobody_owns_is_refused_when_it_is_written(tmp_path):
    with pytest.raises(RuntimeError, match="a has 5 elements, and the ranks own 3 of them"):
        write_tensors(tmp_path, {"a": FlatTensor(torch.zeros(3), 0, 5)}, None)


@pytest.mark.parametrize(("name", "size"), [("missing", 4), ("a", 5)])
def test_a_tensor_that_is_missing_or_of_another_size_is_named(tmp_path, name, size):
    write_tensors(tmp_path, {"a": FlatTensor.whole(torch.zeros(4))}, None)
    with pytest.raises(RuntimeError, match=name):
        read_tensors(tmp_path, {name: FlatTensor(torch.zeros(size), 0, size)})
    with pytest.raises((RuntimeError, KeyError, ValueError), match=name):
        read_whole(tmp_path, {name: (size,)})


def test_the_files_are_ordinary_safetensors(tmp_path: Path):
    write_tensors(tmp_path, {"a": FlatTensor.whole(torch.arange(6.0).view(2, 3))}, None)
    with safe_open(next(tmp_path.glob("*.safetensors")), framework="pt") as file:
        assert file.get_tensor("a").tolist() == [0, 1, 2, 3, 4, 5]


def test_a_copy_that_nothing_waits_for_is_made_at_once(monkeypatch):
    copy_to = torch.Tensor.to

    def to(tensor: torch.Tensor, *where, non_blocking: bool = False, **more) -> torch.Tensor:
        made = copy_to(tensor, *where, **more)
        return made.zero_() if non_blocking else made  # as on MPS: what was copied is not there yet

    monkeypatch.setattr(torch.Tensor, "to", to)
    weights = torch.arange(1.0, 7.0)
    copied = host_copy({"weights": FlatTensor(weights[2:5], 2, 6)})["weights"]
    assert copied.local.tolist() == [3.0, 4.0, 5.0] and (copied.offset, copied.numel()) == (2, 6)
    weights.zero_()  # training goes on
    assert copied.local.tolist() == [3.0, 4.0, 5.0]
