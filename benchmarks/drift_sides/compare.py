"""How far two runs of the same training differ."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


@dataclass(frozen=True)
class Ran:
    """What a run left: per step its loss, gradient norm and work; the evaluation loss; the final weights."""

    losses: list[float]
    grad_norms: list[float]
    work: list[Any]  # the documents of each update, or what was counted of them
    eval_loss: float
    weights: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Drift:
    """Largest relative differences to the run compared with; `weights` as a share of what training moved."""

    first_loss: float
    loss: float
    grad_norm: float
    eval_loss: float
    weights: float
    weights_max_abs: float
    other_work_steps: int  # updates that saw other documents

    def worse(self, other: "Drift") -> "Drift":
        """The larger of each."""
        mine, theirs = asdict(self), asdict(other)
        return Drift(**{field.name: max(mine[field.name], theirs[field.name]) for field in fields(Drift)})


def read_peer(folder: Path) -> Ran:
    """A run of peers.py."""
    result = json.loads((folder / "result.json").read_text())
    ranks = [json.loads(file.read_text()) for file in sorted(folder.glob("documents-*.json"))]
    work = [sorted(document for rank in step for document in rank) for step in zip(*ranks, strict=True)]
    return Ran(result["losses"], result["grad_norms"], work, result["eval_loss"], load_model(folder / "model"))


def read_isotune(run: Path) -> Ran:
    """A run folder of train/sft_opt.py."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    return Ran(
        [line["loss"] for line in steps],
        [line["grad_norm"] for line in steps],
        [[line[key] for key in ("documents", "input_tokens", "supervised_tokens")] for line in steps],
        [line["eval_loss"] for line in lines if "eval_loss" in line][-1],
        load_model(run / "model"),
    )


def load_model(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a saved model, in fp64."""
    return {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}


def drift(base: Ran, other: Ran, initial: dict[str, torch.Tensor]) -> Drift:
    """How far `other` lies from `base`; both started from `initial`."""
    assert len(base.losses) == len(other.losses) and base.weights.keys() == other.weights.keys() == initial.keys()
    apart = {name: other.weights[name] - base.weights[name] for name in initial}
    moved = _norm({name: base.weights[name] - initial[name] for name in initial})
    return Drift(
        first_loss=_relative(base.losses[:1], other.losses[:1]),
        loss=_relative(base.losses, other.losses),
        grad_norm=_relative(base.grad_norms, other.grad_norms),
        eval_loss=_relative([base.eval_loss], [other.eval_loss]),
        weights=_norm(apart) / moved,
        weights_max_abs=max(tensor.abs().max().item() for tensor in apart.values()),
        other_work_steps=sum(a != b for a, b in zip(base.work, other.work, strict=True)),
    )


def _relative(base: list[float], other: list[float]) -> float:
    return max(abs(b / a - 1) for a, b in zip(base, other, strict=True))


def _norm(tensors: dict[str, torch.Tensor]) -> float:
    return sum(tensor.square().sum().item() for tensor in tensors.values()) ** 0.5
