"""Configurations that would waste a run: misspelt, without effect, contradicting or impossible keys.

Each case changes a correct recipe, a shipped accelerate file or a shipped DeepSpeed file; `expects` is the key that the
error message must name.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPE: dict[str, Any] = {
    "model_name_or_path": "builtin:opt-tiny",
    "dataset_name": "builtin:greetings",
    "output_dir": "runs/planned",
    "max_seq_length": 256,
    "tune": "lora",
}


@dataclass(frozen=True)
class Case:
    """A mistake.

    Attributes:
        kind: misspelt, ineffective, contradicting, impossible.
        expects: the key that the message must name.
        recipe: changes to the correct recipe; None removes a key.
        launch: a shipped accelerate file.
        accelerate, deepspeed: changes to that file and to its DeepSpeed file; a dot leads into a section.
        ours_alone: whether it is a mistake only because of what isotune's keys mean; other tools are not asked then.
    """

    kind: str
    expects: str
    recipe: dict[str, Any] = field(default_factory=dict)
    launch: str = "ddp"
    accelerate: dict[str, Any] = field(default_factory=dict)
    deepspeed: dict[str, Any] = field(default_factory=dict)
    ours_alone: bool = False


OURS = {"max_seq_length", "global_batch_size", "microbatch_tokens", "model_init", "gradient_accumulation_steps",
        "per_device_train_batch_size", "dataset_name"}  # fmt: skip


def recipe_case(kind: str, expects: str, **recipe: Any) -> Case:
    """A mistake in the recipe alone."""
    return Case(kind, expects, recipe, ours_alone=kind in ("contradicting", "impossible") and expects in OURS)


CASES = (
    recipe_case("misspelt", "learning_rate", learning_rat=1e-4),
    recipe_case("misspelt", "warmup_steps", warmup_step=100),
    recipe_case("misspelt", "max_seq_length", max_seqlength=128),
    recipe_case("misspelt", "target_modules", target_module=["q_proj"]),
    recipe_case("misspelt", "gradient_checkpointing", gradient_checkpoint=True),
    recipe_case("misspelt", "global_batch_size", globl_batch_size=8),
    recipe_case("misspelt", "num_train_epochs", num_train_epoch=1),
    recipe_case("misspelt", "lr_scheduler_type", lr_scheduler_type="cosin"),
    recipe_case("misspelt", "optim", optim="adamw_torhc"),
    recipe_case("misspelt", "bnb_4bit_quant_type", tune="qlora", bnb_4bit_quant_type="nf5"),
    recipe_case("ineffective", "r", tune="full", r=16),
    recipe_case("ineffective", "lora_alpha", tune="full", lora_alpha=32),
    recipe_case("ineffective", "bnb_4bit_use_double_quant", bnb_4bit_use_double_quant=True),
    recipe_case("ineffective", "eval_steps", eval_steps=10),
    recipe_case("ineffective", "save_steps", save_strategy="epoch", save_steps=10),
    recipe_case("ineffective", "warmup_steps", lr_scheduler_type="constant", warmup_steps=10),
    recipe_case("ineffective", "adam_beta2", optim="sgd", adam_beta2=0.95),
    recipe_case("ineffective", "load_best_model_at_end", load_best_model_at_end=True),
    recipe_case("contradicting", "bf16", bf16=True, fp16=True),
    recipe_case("contradicting", "max_steps", max_steps=10, num_train_epochs=2),
    recipe_case("contradicting", "microbatch_tokens", microbatch_tokens=128),
    recipe_case("contradicting", "model_init", model_init="random", tune="qlora"),
    recipe_case("contradicting", "gradient_accumulation_steps", gradient_accumulation_steps=8),
    recipe_case("contradicting", "per_device_train_batch_size", per_device_train_batch_size=4),
    recipe_case("impossible", "learning_rate", learning_rate=-1e-4),
    recipe_case("impossible", "lora_dropout", lora_dropout=1.5),
    recipe_case("impossible", "global_batch_size", global_batch_size=0),
    recipe_case("impossible", "num_train_epochs", num_train_epochs=-1),
    recipe_case("impossible", "dataset_name", dataset_name=None),
    recipe_case("impossible", "learning_rate", learning_rate="fast"),
    Case("misspelt", "num_processes", accelerate={"num_process": 4}),
    Case("misspelt", "deepspeed_config_file", launch="zero2", accelerate={"deepspeed_config.deepspeed_config": "x"}),
    Case("misspelt", "fsdp_offload_params", launch="fsdp2", accelerate={"fsdp_config.fsdp_offload_param": True}),
    Case("misspelt", "gradient_clipping", launch="zero2", deepspeed={"gradient_clippping": 1.0}),
    Case("misspelt", "reduce_bucket_size", launch="zero2",
         deepspeed={"zero_optimization.reduce_bucket_sise": 1}),
    Case("misspelt", "stage3_param_persistence_threshold", launch="zero3",
         deepspeed={"zero_optimization.stage3_param_persistance_threshold": 1}),
    Case("misspelt", "enabled", launch="zero2", deepspeed={"bf16.enable": True}),
    Case("misspelt", "device", launch="zero3_offload",
         deepspeed={"zero_optimization.offload_optimizer.devise": "cpu"}),
    Case("ineffective", "use_cpu", launch="zero2", accelerate={"use_cpu": True}),
    Case("ineffective", "rdzv_backend", accelerate={"rdzv_backend": "c10d"}),
    Case("ineffective", "MULTI_CPU", accelerate={"distributed_type": "MULTI_CPU"}),
    Case("ineffective", "gradient_clipping", launch="zero2",
         accelerate={"deepspeed_config.gradient_clipping": 0.5}),
    Case("contradicting", "mixed_precision", recipe={"bf16": True}, accelerate={"mixed_precision": "fp16"}),
    Case("contradicting", "mixed_precision", accelerate={"mixed_precision": "bf16"}),
    Case("contradicting", "max_grad_norm", launch="zero2", recipe={"max_grad_norm": 1.0},
         deepspeed={"gradient_clipping": 0.3}),
    Case("contradicting", "gradient_accumulation_steps", launch="zero2", deepspeed={"gradient_accumulation_steps": 8}),
    Case("contradicting", "train_batch_size", launch="zero2", deepspeed={"train_batch_size": 64}),
    Case("contradicting", "bf16.enabled", launch="zero2", deepspeed={"bf16.enabled": True}),
    Case("contradicting", "optimizer", launch="zero2", deepspeed={"optimizer": {"type": "AdamW", "params": {}}}),
    Case("contradicting", "scheduler", launch="zero2", deepspeed={"scheduler": {"type": "WarmupLR", "params": {}}}),
    Case("impossible", "num_processes", launch="single", accelerate={"num_processes": 4}),
    Case("impossible", "zero_optimization.stage", launch="zero2", deepspeed={"zero_optimization.stage": 4}),
    Case("impossible", "does-not-exist.json", launch="zero2",
         accelerate={"deepspeed_config.deepspeed_config_file": "does-not-exist.json"}),
)  # fmt: skip


def write_case(case: Case, folder: Path) -> tuple[Path, Path]:
    """Write the recipe and the accelerate file of a case to `folder`, and return their paths."""
    recipe = {key: value for key, value in (RECIPE | case.recipe).items() if value is not None}
    accelerate = yaml.safe_load((REPOSITORY / "accelerate_configs" / f"{case.launch}.yaml").read_text())
    section = accelerate.get("deepspeed_config", {})
    if "deepspeed_config_file" in section:
        config = json.loads((REPOSITORY / section["deepspeed_config_file"]).read_text())
        section["deepspeed_config_file"] = str(folder / "deepspeed.json")
        (folder / "deepspeed.json").write_text(json.dumps(changed(config, case.deepspeed)))
    files = folder / "recipe.yaml", folder / "accelerate.yaml"
    files[0].write_text(yaml.safe_dump(recipe))
    files[1].write_text(yaml.safe_dump(changed(accelerate, case.accelerate)))
    return files


def changed(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Set keys of `values` in place; a dot leads into a section."""
    for path, value in changes.items():
        *sections, key = path.split(".")
        inner = values
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[key] = value
    return values
