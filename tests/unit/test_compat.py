"""Each patch on a library is still needed by the version at hand, and does what it is for."""

from types import SimpleNamespace

import pytest
import torch
import transformers.trainer
from accelerate import Accelerator, skip_first_batches
from torch import nn
from transformers import TrainingArguments, masking_utils

from isotune.compat.accelerate import let_scaler_check_before_step, run_fp16_on_cpu
from isotune.compat.deepspeed import forget_coalesced_reduction
from isotune.compat.transformers import bf16_without_gpu, checkpoints_reentrantly, let_trainer_skip_steps, loss_device
from isotune.compat.trl import trained_parameters_kept
from isotune.models import packed_attention  # noqa: F401  (patches transformers at its import)
from isotune.models.document_keys import MicrobatchDocuments, known_documents

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="bf16 is refused only where there is no GPU")


class CountingLoader:
    """A loader that notes how many of its steps were asked to be left out."""

    def __init__(self, skipped: int = 0) -> None:
        self.skipped = skipped

    def skipping(self, steps: int) -> "CountingLoader":
        return CountingLoader(self.skipped + steps)


def test_trainer_skips_steps_of_a_loader_that_can_skip_and_torchs_loaders_as_before() -> None:
    let_trainer_skip_steps()
    skip = transformers.trainer.skip_first_batches
    assert skip(CountingLoader(), 3).skipped == 3
    loader = torch.utils.data.DataLoader(list(range(6)), batch_size=2)
    assert [batch.tolist() for batch in skip(loader, 1)] == [batch.tolist() for batch in skip_first_batches(loader, 1)]


def test_the_documents_of_a_packed_microbatch_are_not_looked_for_in_its_positions() -> None:
    find, restarting = masking_utils.find_packed_sequence_indices, torch.tensor([[0, 1, 0, 1]])
    assert find(restarting) is not None  # where nobody said which documents there are
    with known_documents(MicrobatchDocuments([4, 7], [2, 2])):
        assert find(restarting) is None
    with known_documents(MicrobatchDocuments([4, 7], [2, 2], padded=True)):
        assert find(restarting) is not None


def test_a_trainers_sum_of_losses_is_on_the_host_and_is_not_gathered_again(monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(transformers.trainer, "nested_gather", lambda *given: asked.append(given) or torch.zeros(2))
    trainer = SimpleNamespace(_tr_loss=torch.zeros(()))
    assert loss_device(SimpleNamespace(args=SimpleNamespace(device="where it was"))) == "where it was"
    assert loss_device(trainer) == loss_device(trainer) == torch.device("cpu")  # wrapped once
    trainer._tr_loss += torch.tensor(2.5)
    loss = trainer._tr_loss
    assert loss.device.type == "cpu" and transformers.trainer.nested_gather(loss, None) is loss
    assert not asked
    transformers.trainer.nested_gather(torch.tensor(2.5), None)  # of another trainer in this process
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("asked", "enabled", "expected"),
    [
        (None, None, False),
        ({"use_reentrant": False}, None, False),
        ({"preserve_rng_state": False}, None, True),
        (None, {"use_reentrant": True}, True),
        (None, {"use_reentrant": False}, False),
    ],
)
def test_reentrant_checkpoints_are_seen_in_arguments_and_in_the_model(asked, enabled, expected) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=32, **sizes))
    if enabled is not None:
        model.gradient_checkpointing_enable(enabled)
    args = SimpleNamespace(activation_checkpointing_kwargs=asked)
    assert checkpoints_reentrantly(args, model) is expected


@NO_GPU
def test_bf16_arguments_need_the_patch_without_a_gpu_and_get_back_the_librarys_own_check(tmp_path) -> None:
    with pytest.raises(ValueError, match="bf16"):
        TrainingArguments(output_dir=str(tmp_path), bf16=True)
    with bf16_without_gpu():
        assert TrainingArguments(output_dir=str(tmp_path), bf16=True).bf16
    with pytest.raises(ValueError, match="bf16"):
        TrainingArguments(output_dir=str(tmp_path), bf16=True)


def test_fp16_on_cpu_computes_in_fp16_and_scales_the_loss() -> None:
    accelerator = Accelerator(cpu=True)
    run_fp16_on_cpu(accelerator)
    assert accelerator.native_amp and accelerator.scaler is not None and accelerator.scaler.get_scale() > 1


def test_a_fused_optimizer_is_not_stepped_over_an_overflow() -> None:
    def weight_after_overflow(patched: bool) -> tuple[float, bool]:
        """The weight after a step with an infinite gradient, and whether accelerate's way of asking sees the skip."""
        parameter = nn.Parameter(torch.ones(1))
        optimizer = torch.optim.AdamW([parameter], lr=0.5, fused=True)
        if patched:
            let_scaler_check_before_step(optimizer)
        scaler = torch.amp.GradScaler("cpu")
        called = []
        stock = optimizer.step
        optimizer.step = lambda *rest, **more: called.append(1) or stock(*rest, **more)
        scaler.scale((parameter * float("inf")).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        return parameter.item(), bool(called)

    assert weight_after_overflow(patched=False) == (1.0, True)  # the step was called, and found the overflow itself
    assert weight_after_overflow(patched=True) == (1.0, False)


@pytest.mark.parametrize("on", [True, False])
def test_the_optimizer_steps_only_where_gradients_are_in_sync(on: bool) -> None:
    accelerator = Accelerator(cpu=True)
    model = nn.Linear(1, 1)
    optimizer = accelerator.prepare(torch.optim.SGD(model.parameters(), lr=1.0))
    before = model.weight.detach().clone()
    model.weight.grad = torch.ones_like(model.weight)
    accelerator.sync_gradients = on
    optimizer.step()
    accelerator.sync_gradients = True
    assert torch.equal(model.weight, before) is not on


def test_an_exception_leaves_deepspeeds_coalescing_without_a_reduction() -> None:
    class Engine:
        def _flush_coalesced_reduction_zero12(self, optimizer: object) -> None:
            raise AssertionError("reduced")

        _flush_coalesced_reduction_zero3 = _flush_coalesced_reduction_zero12

    engine = Engine()
    forget_coalesced_reduction(engine)
    assert engine._flush_coalesced_reduction_zero12(None) is None
    assert engine._flush_coalesced_reduction_zero3(None) is None


def test_trained_parameters_keep_their_type_and_values_whatever_a_constructor_does() -> None:
    model = nn.Linear(3, 3)
    model.bias.requires_grad_(False)
    weight = model.weight.detach().clone()
    with trained_parameters_kept(model):
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
    assert model.weight.dtype == torch.float32 and torch.equal(model.weight, weight)
    assert model.bias.dtype == torch.bfloat16, "what is not trained is the constructor's business"
