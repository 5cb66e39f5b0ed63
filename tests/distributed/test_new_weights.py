"""What a run adds to its base is the same on any number of processes: first matrices, rows of tokens, routers' loss."""

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tests.building import small_experts, small_opt
from tests.launching import TINY, Finished, start, start_together

EXACT = {**TINY, "exact_gradients": True, "save_strategy": "no", "learning_rate": 1e-2, "max_steps": 4}


def weights_hash(finished: Finished) -> str:
    (file,) = finished.run.glob("model/*.safetensors")
    tensors = load_file(file)
    return hashlib.sha256(b"".join(tensors[name].numpy().tobytes() for name in sorted(tensors))).hexdigest()


def figures(finished: Finished) -> list[tuple]:
    return [(line["step"], line["loss"], line["grad_norm"], line.get("router_loss")) for line in finished.steps]


@pytest.fixture(scope="module")
def recipes(tmp_path_factory) -> dict[str, dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("bases")
    opt = {"model_name_or_path": small_opt(folder / "opt"), "tune": "lora", "lora_dropout": 0.1}
    texts = [f"### Human: <|q|> {n}?### Assistant: <|a|> It is {2 * n}." for n in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return {
        "pissa": EXACT | opt | {"init_lora_weights": "pissa", "r": 4},
        "pissa_niter": EXACT | opt | {"init_lora_weights": "pissa_niter_4", "r": 4},
        "tokens": EXACT | opt | {"add_tokens": ["<|q|>", "<|a|>"], "dataset_name": str(folder / "rows.jsonl")},
        "routers": EXACT | {"model_name_or_path": small_experts(folder / "experts"), "router_aux_loss_coef": 0.5},
    }


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, recipes) -> Callable[[Sequence[str]], dict[str, Finished]]:
    """The recipes of these names on one plain process."""

    def runs(names: Sequence[str]) -> dict[str, Finished]:
        return start_together(tmp_path_factory.mktemp("one"), {name: recipes[name] for name in names})

    return functools.cache(runs)


ALL = ("pissa", "pissa_niter", "tokens", "routers")


@pytest.mark.parametrize(
    ("names", "processes"), [(ALL[2:], 2), *(pytest.param(ALL, n, marks=pytest.mark.slow) for n in (2, 3))]
)
def test_they_have_the_same_bits_on_any_number_of_processes(tmp_path, recipes, one_process, names, processes):
    alone = one_process(names)
    some = {name: recipes[name] for name in names}
    for name, several in start_together(tmp_path, some, processes=processes).items():
        assert several.environment["world_size"] == processes
        assert figures(several) == figures(alone[name]), name
        assert weights_hash(several) == weights_hash(alone[name]), name
    assert all(line["router_loss"] >= 1.0 for line in alone["routers"].steps)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["fsdp2.yaml"])
def test_an_engine_that_shards_saves_the_adapter_over_the_published_base(tmp_path, recipes, one_process, config):
    recipe = recipes["pissa"] | {"optim": "adamw_torch"}
    sharded, alone = start(tmp_path, recipe, processes=2, config=config), one_process(ALL)["pissa"]
    for line, other in zip(sharded.steps, alone.steps, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-4)
    saved, expected = (load_file(run.run / "model/adapter_model.safetensors") for run in (sharded, alone))
    assert saved.keys() == expected.keys()
    for name, tensor in expected.items():
        assert saved[name].shape == tensor.shape
        assert (saved[name] - tensor).norm() <= 2e-2 * tensor.norm(), name
