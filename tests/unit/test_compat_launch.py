"""Each private member of a library that a launch or a preflight report needs still does what its patch expects."""

import copy
import importlib

import deepspeed
import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType
from sklearn.svm import LinearSVC
from tests.causal_models import small_model
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from isotune.compat.accelerate import allow_fsdp_on_cpu, launcher_options
from isotune.compat.deepspeed import disable_shm_transport
from isotune.compat.scikit_learn import check_parameters
from isotune.compat.torch import ReduceScatter, clone_default_store, fsdp2_offloads, is_in_backward, reduce_scatter
from isotune.io.errors import UserError
from isotune.models.causal import install_causal


@pytest.fixture
def one_rank():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_clone_of_the_default_store_keeps_its_keys_under_its_prefix(monkeypatch):
    default = dist.HashStore()
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: default)
    clone_default_store("mine").set("key", "value")
    assert default.get("mine/key") == b"value"


@pytest.mark.parametrize("offloads", [True, False])
def test_the_offload_policy_of_a_sharded_module_is_read_back(one_rank, offloads):
    policy = {"offload_policy": CPUOffloadPolicy(pin_memory=False)} if offloads else {}
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    model = fully_shard(nn.Linear(2, 2), mesh=mesh, **policy)
    assert isinstance(model, FSDPModule)
    assert fsdp2_offloads(model) is offloads


@pytest.fixture
def in_shares(one_rank, monkeypatch):
    """Puts a model into DeepSpeed's shares, of one rank, before any engine takes it over."""
    disable_shm_transport()
    monkeypatch.setenv("LOCAL_RANK", "0")
    communication = importlib.import_module("deepspeed.comm.comm")
    monkeypatch.setattr(communication, "cdb", communication.cdb)
    deepspeed.init_distributed("gloo")
    config = {"train_batch_size": 1, "zero_optimization": {"stage": 3}}
    return lambda model: deepspeed.zero.Init(module=model, config_dict_or_path=config)


@pytest.mark.parametrize("kind", ["bloom", "granite", "llama4_text"])
def test_a_model_in_shares_is_measured_as_a_whole_one_is(kind, in_shares):
    model = small_model(kind)
    expected = install_causal(copy.deepcopy(model), 64)
    in_shares(model)
    assert not sum(parameter.numel() for parameter in model.parameters())
    assert install_causal(model, 64) == expected
    assert not sum(parameter.numel() for parameter in model.parameters()), "the shares are let go again"


def test_a_model_in_shares_whose_tokens_see_later_ones_is_refused(in_shares):
    model = small_model("bert")
    in_shares(model)
    with pytest.raises(UserError, match="'bert' lets a token see the ones after it"):
        install_causal(model, 64)


def test_a_reduce_scatter_has_either_name_and_takes_integers(one_rank):
    whole = torch.tensor([2**62, -1, 5])
    assert torch.equal(reduce_scatter(whole, dist.group.WORLD), whole)


class Recorder(ReduceScatter):
    """Notes what FSDP2 hands over, and sends nothing."""

    def __init__(self) -> None:
        self.seen = []

    def allocate(self, size, *, dtype, device):
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor, input_tensor, group, op, async_op=False):
        self.seen.append(input_tensor.tolist())
        output_tensor.zero_()


def test_fsdp2_hands_over_whole_gradients_by_rank_and_then_calls_the_hooks_of_the_shards_in_order():
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        model = nn.Linear(2, 3)  # 3 rows: 2 on the first rank, 1 on the second and a row of padding
        fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
        model.set_custom_reduce_scatter(recorder := Recorder())
        names = {parameter: name for name, parameter in model.named_parameters()}
        for parameter in names:
            parameter.register_post_accumulate_grad_hook(
                lambda p: recorder.seen.append((names[p], tuple(p.grad.to_local().shape)))
            )
        (model(torch.tensor([[10.0, 20.0]])) * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    finally:
        dist.destroy_process_group()
    first, second = [10.0, 20.0, 20.0, 40.0, 1.0, 2.0], [30.0, 60.0, 0.0, 0.0, 3.0, 0.0]
    assert recorder.seen == [first + second, ("weight", (1, 2)), ("bias", (1,))]


def test_autograd_knows_that_it_is_in_a_backward_pass():
    seen = []
    weight = torch.ones(1, requires_grad=True)
    weight.register_hook(lambda gradient: seen.append(is_in_backward()))
    weight.sum().backward()
    assert seen == [True] and not is_in_backward()


def test_deepspeed_believes_that_its_cpu_transport_cannot_be_built(monkeypatch):
    monkeypatch.setitem(deepspeed.ops.__compatible_ops__, "deepspeed_shm_comm", True)
    disable_shm_transport()
    assert deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] is False


def test_the_launchers_options_are_those_of_its_help():
    assert {"zero_stage", "deepspeed_config_file"} <= set(launcher_options("DeepSpeed Arguments"))
    assert "fsdp_offload_params" in launcher_options("FSDP Arguments")


def test_accelerate_takes_the_type_that_fsdp_needs(monkeypatch):
    monkeypatch.setattr(PartialState, "_shared_state", {})
    PartialState(cpu=True)
    allow_fsdp_on_cpu()
    assert PartialState().distributed_type == DistributedType.MULTI_GPU


def test_scikit_learn_refuses_a_parameter_without_a_fit():
    check_parameters(LinearSVC(C=1.0))
    with pytest.raises(ValueError, match="'C' parameter"):
        check_parameters(LinearSVC(C=-1.0))
