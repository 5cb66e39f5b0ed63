"""The engines that the tests go through, and how two runs of one recipe are compared."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from tests.building import BIASES_WITHOUT_GRADIENT, small_opt
from tests.launching import REPOSITORY, TINY, Finished

# OPT-350M's form: an embedding narrower than the model, projected in and out, and norms after each block
GEOMETRY = {"hidden_size": 128, "word_embed_proj_dim": 64, "ffn_dim": 256, "do_layer_norm_before": False}
DROPOUT = {"dropout": 0.1, "attention_dropout": 0.1}
STEPS = 6


@dataclass(frozen=True)
class Engine:
    """One launch: a shipped configuration on a number of processes (0: plain python)."""

    name: str
    config: str
    processes: int
    kind: str
    zero_stage: int | None = None


PLAIN = Engine("plain on 1", "", 0, "plain")
ENGINES = (
    Engine("DDP on 2", "ddp.yaml", 2, "DDP"),
    Engine("DDP on 3", "ddp.yaml", 3, "DDP"),
    Engine("ZeRO-0 on 2", "zero0.yaml", 2, "DeepSpeed", 0),
    Engine("ZeRO-1 on 2", "zero1.yaml", 2, "DeepSpeed", 1),
    Engine("ZeRO-2 on 2", "zero2.yaml", 2, "DeepSpeed", 2),
    Engine("ZeRO-2 on 4", "zero2.yaml", 4, "DeepSpeed", 2),
    Engine("ZeRO-3 on 2", "zero3.yaml", 2, "DeepSpeed", 3),
    Engine("ZeRO-3 + offload on 2", "zero3_offload.yaml", 2, "DeepSpeed", 3),
    Engine("FSDP2 on 2", "fsdp2.yaml", 2, "FSDP"),
)


def engine(name: str) -> Engine:
    """The engine of this name."""
    return next(one for one in ENGINES if one.name == name)


def config_of(one: Engine, folder: Path) -> str:
    """The engine's configuration; ZeRO-0, which nobody needs but to compare, is made from that of ZeRO-1."""
    if one.config != "zero0.yaml":
        return one.config
    return changed_zero(folder, "zero1", stage=0)


def changed_zero(folder: Path, name: str, **keys: Any) -> str:
    """A copy of the shipped NAME.yaml and NAME.json, with other keys of `zero_optimization`."""
    written = yaml.safe_load((REPOSITORY / f"accelerate_configs/{name}.yaml").read_text())
    settings = json.loads((REPOSITORY / f"ds_configs/{name}.json").read_text())
    settings["zero_optimization"] |= keys
    (folder / "changed.json").write_text(json.dumps(settings))
    written["deepspeed_config"]["deepspeed_config_file"] = str(folder / "changed.json")
    (folder / "changed.yaml").write_text(yaml.safe_dump(written))
    return str(folder / "changed.yaml")


def recipes(folder: Path, **values: Any) -> dict[str, dict[str, Any]]:
    """Full, LoRA and QLoRA on a saved model with dropout, and a global batch that 2, 3 and 4 do not divide."""
    model = small_opt(folder / "opt", **GEOMETRY, **DROPOUT)
    shared = {
        **TINY,
        "model_name_or_path": model,
        "max_steps": STEPS,
        "eval_dataset_name": "builtin:greetings",
        "save_strategy": "no",
        **values,
    }
    return {
        "full": {**shared, "tune": "full", "learning_rate": 1e-3},
        "lora": {**shared, "tune": "lora", "lora_dropout": 0.1, "learning_rate": 1e-2},
        "qlora": {**shared, "tune": "qlora", "lora_dropout": 0.1, "learning_rate": 1e-2},
    }


@dataclass(frozen=True)
class Deviation:
    """The largest relative differences between two runs of one recipe.

    Attributes:
        loss: of any step.
        early_norm: of the gradient norm of the first three steps.
        norm: of any step's.
        eval_loss: of the evaluation.
        weights: norm of the difference of a tensor over the norm of how far training moved it, the worst tensor.
    """

    loss: float
    early_norm: float
    norm: float
    eval_loss: float
    weights: float


def deviation(one: Finished, other: Finished, base: Path) -> Deviation:
    """How far `other` is from `one`, both trained from the weights in `base`."""
    losses, norms = [relative(one.steps, other.steps, key) for key in ("loss", "grad_norm")]
    return Deviation(
        loss=max(losses),
        early_norm=max(norms[:3]),
        norm=max(norms),
        eval_loss=max(relative(one.evaluations, other.evaluations, "eval_loss")),
        weights=_weights_apart(saved(one), saved(other), load_file(base / "model.safetensors")),
    )


def relative(lines: Sequence[dict], others: Sequence[dict], key: str) -> list[float]:
    """Relative differences of a figure, line by line."""
    return [abs(a[key] - b[key]) / abs(a[key]) for a, b in zip(lines, others, strict=True)]


def saved(finished: Finished) -> dict[str, torch.Tensor]:
    """The tensors of the final model or adapter."""
    (file,) = finished.run.glob("model/*.safetensors")
    return load_file(file)


def _weights_apart(one: dict, other: dict, base: dict) -> float:
    assert one.keys() == other.keys()
    apart = []
    for name, tensor in one.items():
        if name.endswith(BIASES_WITHOUT_GRADIENT):
            continue
        start = base.get(name)
        moved = tensor - start if start is not None else tensor
        assert moved.norm() > 0, f"{name} was not trained"
        apart.append(float((tensor - other[name]).norm() / moved.norm()))
    return max(apart)
