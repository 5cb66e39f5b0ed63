"""Each private member of a library that a launch or a preflight report needs still does what its patch expects."""

import deepspeed
import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType
from sklearn.svm import LinearSVC
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, fully_shard

from isotune.compat.accelerate import allow_fsdp_on_cpu, launcher_options
from isotune.compat.deepspeed import disable_shm_transport
from isotune.compat.scikit_learn import check_parameters
from isotune.compat.torch import clone_default_store, fsdp2_offloads, is_in_backward


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
