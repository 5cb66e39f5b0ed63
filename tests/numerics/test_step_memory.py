"""What a plan says of activations and loss is what torch's allocator hands out in real training steps: to within 15%.

Here as small models in one process; as OPT-125M, OPT-350M and BERT-base on real data in `make test-all`, each geometry
in a process of its own. tests/numerics/step_memory.py measures, and knows nothing of the plan.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.building import OPT_350M, small_encoder, small_opt
from tests.launching import TINY, TINY_CLASSIFIER, run_command, write_recipe
from tests.numerics.step_memory import measure, rise_of
from torch.profiler import ProfilerActivity, profile
from transformers import BertConfig, OPTConfig

from isotune.models.cpu.functional import Workspace
from isotune.preflight.preflight_report import run_preflight
from isotune.preflight.request import read_preflight_request

LIMIT = 0.15
STEPS = {"max_steps": 2, "save_strategy": "no", "bf16": True, "disable_tqdm": True}
PASSES = 2

GEOMETRIES: dict[str, Any] = {
    "opt-125m": OPTConfig(),
    "opt-350m": OPTConfig(**OPT_350M),
    "bert-base": BertConfig(),
}
CASES = [(name, length) for name in ("opt-125m", "opt-350m") for length in (1024, 512, 256)]
CASES += [("bert-base", length) for length in (512, 256, 128)]  # as far as its positions go


def planned(file: Path) -> int:
    asked = read_preflight_request(file, [], None, None)
    assert asked.problems == ()
    return run_preflight(asked, show_progress=False).memory.activations


@pytest.mark.parametrize(
    ("kind", "tune", "checkpointing", "passes"),
    [
        pytest.param("opt", "full", False, PASSES, marks=pytest.mark.slow),
        pytest.param("opt", "full", True, 1, marks=pytest.mark.slow),
        ("opt", "lora", True, PASSES),
        pytest.param("bert", "full", True, PASSES, marks=pytest.mark.slow),
        pytest.param("bert", "full", False, 1, marks=pytest.mark.slow),
        pytest.param("bert", "lora", False, PASSES, marks=pytest.mark.slow),
    ],
)
def test_a_small_models_step_holds_what_its_plan_says(tmp_path, kind, tune, checkpointing, passes):
    shape = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    recipe = STEPS | {"tune": tune, "gradient_checkpointing": checkpointing}
    if kind == "opt":
        model = small_opt(tmp_path / "opt", **shape, word_embed_proj_dim=64, ffn_dim=512, dropout=0.1)
        recipe = TINY | recipe | {"model_name_or_path": model, "global_batch_size": passes}
    else:
        model = small_encoder(tmp_path / "bert", "bert", **shape, intermediate_size=512)
        recipe = TINY_CLASSIFIER | recipe | {"model_name_or_path": model, "num_labels": 3, "microbatch_tokens": 512}
        recipe |= {"global_batch_size": 6 if passes == 1 else 30}
    found = measure(recipe)
    assert planned(write_recipe(tmp_path, recipe)) == pytest.approx(found["rise"] - found["gradients"], rel=LIMIT)


def of_geometry(name: str, folder: Path, data: Path, tune: str, length: int, checkpointing: bool) -> dict[str, Any]:
    """A recipe whose steps are passes over real documents of up to `length` tokens, the longest not the first."""
    recipe = STEPS | {"model_name_or_path": str(folder), "model_init": "random", "tune": tune, "learning_rate": 1e-5}
    recipe |= {"max_seq_length": length, "gradient_checkpointing": checkpointing}
    if name == "bert-base":
        tokens = 2_048
        recipe |= {"dataset_name": str(data / "imdb"), "num_labels": 2, "overlong": "head_tail"}
        recipe |= {"tokenizer_name_or_path": str(data / "tokenizers" / "bert-base-uncased")}
        # real reviews are shorter than `length`: fewer would be one full pass, before there are gradients
        return recipe | {"microbatch_tokens": tokens, "global_batch_size": 4 * PASSES * tokens // length}
    recipe |= {"dataset_name": str(data / "guanaco"), "tokenizer_name_or_path": str(data / "tokenizers" / "opt")}
    return recipe | {"global_batch_size": PASSES, "microbatch_tokens": length, "sample_prompt": ""}


def test_a_workspace_that_grows_never_holds_both_blocks():
    workspace = Workspace()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        workspace.empty([1000], torch.float32)
        workspace.empty([3000], torch.float32)
    assert rise_of(seen) == 3000 * 4


@pytest.mark.slow
@pytest.mark.parametrize(("name", "length"), CASES)
@pytest.mark.parametrize("tune", ["lora", "full"])
def test_a_known_geometrys_step_holds_what_its_plan_says(shared_data, tmp_path, name, length, tune):
    GEOMETRIES[name].save_pretrained(tmp_path / name)
    files = []
    for checkpointing in (False, True):
        recipe = of_geometry(name, tmp_path / name, shared_data, tune, length, checkpointing)
        files.append(write_recipe(tmp_path / f"checkpointing-{checkpointing}", recipe))
    command = [sys.executable, "-m", "tests.numerics.step_memory", *map(str, files)]
    done = run_command(command, fresh=True)  # its memory is measured
    assert done.returncode == 0, done.stderr
    for file, line in zip(files, (x for x in done.stdout.splitlines() if x.startswith('{"')), strict=True):
        found = json.loads(line)
        plan, real = planned(file), found["rise"] - found["gradients"]
        print(f"{name} {tune} {length} {file.parent.name}: {plan / 1e6:.1f} of {real / 1e6:.1f} MB, {plan / real:.3f}")
        assert plan == pytest.approx(real, rel=LIMIT)
