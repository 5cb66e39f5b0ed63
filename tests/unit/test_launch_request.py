"""A launch that became another one, or whose files contradict the recipe, is refused with the key and the file."""

import json
import re
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.config import DeepSpeedConfig, DtypeEnum
from tests.launching import REPOSITORY, TINY

from isotune.config import Recipe
from isotune.distributed.deepspeed_config import (
    complete,
    find_file,
    gradient_dtypes,
    offloaded,
    read_deepspeed_config,
    stage_of,
)
from isotune.distributed.launch import Process, Request, check_launch, launch_arguments
from isotune.io.errors import UserError
from isotune.training.arguments import uses_exact_gradients

ONE = {"WORLD_SIZE": "1"}


def recipe(**values) -> Recipe:
    return Recipe.from_values(**{**TINY, "output_dir": "runs/unused", **values})


def zero(stage: int = 2, **more) -> dict:
    return {"zero_optimization": {"stage": stage}, **more}


def refusal(config: dict, **values) -> str:
    with pytest.raises(UserError) as refused:
        complete(config, recipe(**values), 2, "zero2.json")
    return str(refused.value)


def test_everything_left_open_comes_from_the_recipe():
    config = complete(zero(bf16={"enabled": "auto"}), recipe(bf16=True, max_grad_norm=0.7), 3, "zero2.json")
    assert config["gradient_clipping"] == 0.7, "absent, DeepSpeed would clip nothing"
    assert config["bf16"]["enabled"] is True and config["fp16"]["enabled"] is False
    assert (config["train_batch_size"], config["gradient_accumulation_steps"]) == (3, 1)
    assert "auto" not in json.dumps(config)


@pytest.mark.parametrize(
    ("stage", "values", "own", "sums"),
    [
        (2, {"bf16": True}, {}, ("float32", "float32")),
        (0, {"bf16": True}, {}, ("bfloat16", "float32")),  # DeepSpeed refuses fp32 sums of microbatches without ZeRO
        (3, {}, {}, ("float32", "float32")),
        (3, {"bf16": True}, {"communication_data_type": "bf16"}, ("float32", "bfloat16")),
        (1, {"bf16": True}, {"data_types": {"grad_accum_dtype": "bf16"}}, ("bfloat16", "float32")),
        (2, {"fp16": True}, {}, ("float16", "float16")),
    ],
)
def test_gradients_are_summed_in_fp32_where_deepspeed_can_and_its_file_says_nothing_else(stage, values, own, sums):
    config = complete(zero(stage, **own), recipe(**values), 1, "mine.json")
    assert gradient_dtypes(config) == sums
    theirs = DeepSpeedConfig(config)  # what DeepSpeed itself reads
    model = "bf16" if values.get("bf16") else "fp16" if values.get("fp16") else "fp32"
    accumulated = DtypeEnum(theirs.grad_accum_dtype or model).value
    communicated = theirs.communication_data_type or DtypeEnum(model).value
    assert (str(accumulated), str(communicated)) == tuple(f"torch.{name}" for name in sums)


def test_every_shipped_file_is_complete_with_numbers_for_its_buckets():
    for file in sorted((REPOSITORY / "ds_configs").glob("*.json")):
        config = complete(json.loads(file.read_text()), recipe(), 2, file.name)
        assert all(isinstance(v, int) for k, v in config["zero_optimization"].items() if "bucket_size" in k)
        assert config["zero_force_ds_cpu_optimizer"] is False
        assert str(stage_of(config)) in file.name
        assert bool(offloaded(config)) is ("offload" in file.name)


@pytest.mark.parametrize(
    ("config", "values", "sentence"),
    [
        (
            zero(gradient_clippping=1.0),
            {},
            "zero2.json: 'gradient_clippping' is not a key of DeepSpeed's: did you mean 'gradient_clipping'?",
        ),
        (
            {"zero_optimization": {"stage": 2, "reduce_bucket_sise": 5}},
            {},
            "'zero_optimization.reduce_bucket_sise' is not a key of DeepSpeed's: did you mean 'reduce_bucket_size'?",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"devise": "cpu"}}},
            {},
            "'zero_optimization.offload_param.devise' is not a key of DeepSpeed's: did you mean 'device'?",
        ),
        (zero(gradient_clipping=0.5), {}, "says gradient_clipping: 0.5, and the recipe max_grad_norm: 1: say"),
        (zero(bf16={"enabled": True}), {}, "says bf16.enabled: true, and the recipe bf16: false: say"),
        (zero(fp16={"enabled": False}), {"fp16": True}, "says fp16.enabled: false, and the recipe fp16: true: say"),
        (
            zero(bf16={"enabled": True, "bf16_master_weights_and_grads": True}),
            {"bf16": True},
            "says bf16.bf16_master_weights_and_grads, and what is trained stays in fp32",
        ),
        (
            zero(data_types={"grad_acum_dtype": "fp32"}),
            {},
            "'data_types.grad_acum_dtype' is not a key of DeepSpeed's: did you mean 'grad_accum_dtype'?",
        ),
        (
            zero(data_types={"grad_accum_dtype": "fp64"}),
            {"bf16": True},
            'says data_types.grad_accum_dtype: "fp64": it takes fp32, bf16, fp16',
        ),
        (
            zero(communication_data_type="float32"),
            {},
            'says communication_data_type: "float32": it takes fp32, bf16, fp16',
        ),
        (
            zero(communication_data_type={}),
            {},
            "says communication_data_type: {}: it takes fp32, bf16, fp16",
        ),
        (zero(torch_autocast={"enabled": True}), {}, "enables torch_autocast, and the recipe says the precision"),
        (zero(train_batch_size=8), {}, "says train_batch_size: 8, and a step sees global_batch_size rows"),
        (
            zero(gradient_accumulation_steps=4),
            {},
            "says gradient_accumulation_steps: 4, and the step schedule lays out",
        ),
        (zero(optimizer={"type": "AdamW"}), {}, "has a section 'optimizer', and the recipe says optim, learning_rate"),
        (zero(scheduler={"type": "WarmupLR"}), {}, "has a section 'scheduler', and the recipe says lr_scheduler_type"),
        (
            zero(tensor_parallel={"autotp_size": 2}),
            {},
            "asks for tensor_parallel, and isotune uses data parallelism only",
        ),
        ({"bf16": {"enabled": "auto"}}, {}, "has no zero_optimization: say at least"),
        (zero(stage=7), {}, "zero2.json: zero_optimization.stage is 7: "),
        ({"zero_optimization": True}, {}, "zero_optimization is true: it takes a section of keys"),
    ],
)
def test_a_wrong_or_contradicting_key_is_named_with_its_file(config, values, sentence):
    said = refusal(config, **values)
    assert sentence in said and said.count("\n") == 0 and "zero2.json" in said


def test_a_plan_reads_on_without_the_section_that_training_refuses():
    said: list[str] = []
    assert complete({"tensor_parallel": {"autotp_size": 2}}, recipe(), 2, "mine.json", said.append)
    assert len(said) == 2 and "tensor_parallel" in said[0] and "has no zero_optimization" in said[1]


@pytest.mark.parametrize(
    ("zero", "sentence"),
    [
        ({"stage": "two"}, 'zero_optimization.stage is "two": '),
        ({"stage": 2, "reduce_bucket_size": "large"}, 'zero_optimization.reduce_bucket_size is "large": '),
    ],
)
def test_a_value_that_deepspeed_cannot_read_ends_a_plan_too(zero, sentence):
    with pytest.raises(UserError, match=re.escape(f"mine.json: {sentence}")):
        complete({"zero_optimization": zero}, recipe(), 2, "mine.json", [].append)


def read(file: str, fields: str = "") -> dict:
    given = {"ACCELERATE_DEEPSPEED_CONFIG_FILE": file, "ACCELERATE_CONFIG_DS_FIELDS": fields}
    return read_deepspeed_config(recipe(), 2, given)


def test_a_missing_broken_or_doubled_file_is_one_sentence(tmp_path: Path):
    with pytest.raises(UserError, match=r"deepspeed_config_file 'ds_configs/zero9\.json' does not exist, neither here"):
        read("ds_configs/zero9.json")
    broken = tmp_path / "broken.json"
    broken.write_text('{"zero_optimization": {\n  "stage": 2,,\n}}')
    with pytest.raises(UserError, match=r"broken\.json, line 2, is not JSON"):
        read(str(broken))
    broken.write_text('{"zero_optimization": {"stage": 2, "stage": 3}}')
    with pytest.raises(UserError, match=r"broken\.json says stage twice"):
        read(str(broken))
    broken.write_text("[]")
    with pytest.raises(UserError, match=r"broken\.json is not a JSON object"):
        read(str(broken))


def test_what_stands_beside_the_file_in_accelerates_configuration_is_refused():
    with pytest.raises(UserError, match=r"says gradient_clipping, and so may .*zero2\.json: take it out of the first"):
        read(str(REPOSITORY / "ds_configs/zero2.json"), "deepspeed_config_file,gradient_clipping")


def test_the_file_is_found_from_another_folder_among_the_shipped_ones(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_file("ds_configs/zero2.json") == REPOSITORY / "ds_configs/zero2.json"


def test_without_a_file_accelerates_own_keys_say_the_same():
    given = {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"}
    config = read_deepspeed_config(recipe(), 2, given)
    assert stage_of(config) == 3 and offloaded(config) == ["param"] and config["gradient_clipping"] == 1.0
    with pytest.raises(UserError, match=r"the accelerate configuration says gradient_clipping: 0\.3"):
        read_deepspeed_config(recipe(), 2, {**given, "ACCELERATE_GRADIENT_CLIPPING": "0.3"})
    with pytest.raises(UserError, match="says gradient_accumulation_steps: 4"):
        read_deepspeed_config(recipe(), 2, {**given, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"})


def asked(engine: str = "DDP", processes: int | None = 2, on_cpu: bool = False, **written) -> Request:
    return Request("mine.yaml", engine, processes, on_cpu, written)


def test_a_launch_that_is_what_was_asked_passes():
    check_launch(asked(), recipe(), {"WORLD_SIZE": "2"})
    check_launch(None, recipe(), {})
    check_launch(asked("DeepSpeed"), recipe(), {"WORLD_SIZE": "2", "ACCELERATE_USE_DEEPSPEED": "true"})
    check_launch(asked(), recipe(bf16=True), {"WORLD_SIZE": "2", "ACCELERATE_MIXED_PRECISION": "bf16"})


@pytest.mark.parametrize(
    ("request_", "environment", "values", "sentence"),
    [
        (asked(on_cpu=True), ONE, {}, r"2 processes were asked \(num_processes\) and 1 started: --cpu, use_cpu: true"),
        (asked("plain"), ONE, {}, "2 processes were asked .* 1 started: mine.yaml is for one process"),
        (asked("DeepSpeed"), {"WORLD_SIZE": "2"}, {}, "mine.yaml asks for DeepSpeed, and accelerate started a plain"),
        (asked("FSDP"), ONE, {}, "mine.yaml asks for FSDP, and accelerate started a plain process"),
        (
            asked(),
            {"WORLD_SIZE": "2", "ACCELERATE_MIXED_PRECISION": "bf16"},
            {},
            r"mine.yaml: mixed_precision \(bf16\) and the recipe \(neither bf16 nor fp16\) contradict each other",
        ),
        (
            asked(),
            {"WORLD_SIZE": "2", "ACCELERATE_MIXED_PRECISION": "fp16"},
            {"bf16": True},
            r"mixed_precision \(fp16\) and the recipe \(bf16: true\) contradict each other",
        ),
        (
            asked("DeepSpeed", deepspeed_config={"zero_stagee": 2}),
            {"WORLD_SIZE": "2", "ACCELERATE_USE_DEEPSPEED": "true"},
            {},
            "mine.yaml: deepspeed_config has no key 'zero_stagee': did you mean 'zero_stage'?",
        ),
        (
            asked("FSDP", fsdp_config={"fsdp_reshard_after_forwards": True}),
            {"WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true"},
            {},
            "fsdp_config has no key 'fsdp_reshard_after_forwards': did you mean 'fsdp_reshard_after_forward'?",
        ),
        (
            asked(rdzv_backend="c10d"),
            {"WORLD_SIZE": "2"},
            {},
            "mine.yaml: rdzv_backend has no effect in a file: give it to accelerate launch as the flag --rdzv_backend",
        ),
    ],
)
def test_a_launch_that_became_another_one_is_refused(request_, environment, values, sentence):
    with pytest.raises(UserError, match=sentence):
        check_launch(request_, recipe(**values), environment)


def test_tasks_of_srun_that_would_each_train_alone_are_refused():
    with pytest.raises(UserError, match="srun started 2 independent tasks"):
        check_launch(None, recipe(), {"SLURM_STEP_NUM_TASKS": "2"})
    check_launch(None, recipe(), {"SLURM_STEP_NUM_TASKS": "2", "WORLD_SIZE": "2"})


@pytest.mark.parametrize(
    "command",
    [
        ["python", "/x/bin/accelerate", "launch", "--num_processes", "2", "s.py"],
        ["python", "-m", "accelerate.commands.launch", "--num_processes", "2", "s.py"],
        ["python", "-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", "2", "s.py"],
        ["/x/bin/accelerate-launch", "--num_processes", "2", "s.py"],
    ],
)
def test_the_launchers_command_line_is_known_in_each_of_its_spellings(command):
    assert launch_arguments(command) == ["--num_processes", "2", "s.py"]
    assert launch_arguments(["torchrun", "--nproc_per_node", "2", "s.py"]) is None
    assert launch_arguments(["bash"]) is None


def process_under(stage: int, **keys) -> Process:
    return Process(0, 2, torch.device("cpu"), deepspeed_config={"zero_optimization": {"stage": stage, **keys}})


ASKED_FOR = {"exact_gradients": True, "optim": "adamw_torch"}
UNDER_FSDP = Process(0, 2, torch.device("cpu"), fsdp=True)


@pytest.mark.parametrize(
    ("process", "values", "sentence"),
    [
        (process_under(0), {}, "cannot hold under ZeRO-0: use DDP, FSDP2, ZeRO-1, ZeRO-2 or ZeRO-3"),
        (process_under(2), {"bf16": True}, "cannot hold under ZeRO-2 in bf16.*use DDP, FSDP2 or ZeRO-3"),
        (process_under(3), {"fp16": True}, "cannot hold under ZeRO-3 in fp16"),
        (UNDER_FSDP, {"fp16": True}, "cannot hold under FSDP in fp16"),
        (process_under(3, zero_quantized_gradients=True), {}, "zero_quantized_gradients, which rounds what travels"),
        (process_under(3, mics_shard_size=2), {}, "zero_optimization.mics_shard_size"),
        (
            process_under(3, offload_optimizer={"device": "nvme"}),
            {},
            "zero_optimization.offload_optimizer.device: nvme",
        ),
        *(
            (process, {"optim": "adamw_torch_fused"}, f"{name} needs optim: adamw_torch or sgd, because adamw_torch_f")
            for process, name in ((process_under(1), "ZeRO-1"), (process_under(3), "ZeRO-3"), (UNDER_FSDP, "FSDP"))
        ),
    ],
)
def test_exact_gradients_are_refused_where_an_engine_cannot_keep_them(process, values, sentence):
    with pytest.raises(UserError, match=f"^exact_gradients: true .*{sentence}"):
        uses_exact_gradients(recipe(**ASKED_FOR | values), process)
    assert not uses_exact_gradients(recipe(**ASKED_FOR | values | {"exact_gradients": False}), process)


@pytest.mark.parametrize(
    ("process", "values"),
    [
        (process_under(1), {}),
        (process_under(2), {}),
        (process_under(3), {"bf16": True}),
        (process_under(3, offload_optimizer={"device": "cpu"}), {}),
        (UNDER_FSDP, {"bf16": True}),
    ],
)
def test_exact_gradients_under_an_engine_that_shards_are_for_those_who_ask(process, values):
    assert uses_exact_gradients(recipe(**ASKED_FOR | values), process)
    assert not uses_exact_gradients(recipe(tune="lora", **values), process)
