"""Under ZeRO-3 pretrained weights load in shares: no rank ever holds the whole model in memory of its own."""

import json
from pathlib import Path

import pytest
from tests.building import small_opt
from tests.launching import TINY, launcher, run_command, write_recipe

# 76 million numbers: large beside what Python itself allocates meanwhile, and no tensor large beside the whole
GEOMETRY = {"hidden_size": 1024, "word_embed_proj_dim": 1024, "ffn_dim": 4096, "num_hidden_layers": 6}
# glibc would else keep freed tensors for later, which looks as if they were held
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}


def load(folder: Path, model: str, config: str) -> list[dict]:
    """What each of two ranks measured while it loaded."""
    folder.mkdir()
    recipe = write_recipe(folder, {**TINY, "model_name_or_path": model})
    script = ["tests/distributed/load_in_shares.py", str(recipe), str(folder)]
    done = run_command([*launcher(config, 2), *script], GIVE_BACK, fresh=True)  # its memory is measured
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
def test_no_rank_ever_holds_all_of_a_pretrained_model_and_tied_weights_stay_tied(tmp_path: Path):
    model = small_opt(tmp_path / "opt", **GEOMETRY, num_attention_heads=8, init_std=0.02)
    for rank in load(tmp_path / "zero3", model, "zero3.yaml"):
        whole_bytes = 4 * rank["parameters"]
        assert rank["tied"]
        assert rank["held"] <= 0.51 * rank["parameters"]
        assert rank["peak_bytes"] < 0.9 * whole_bytes
    for rank in load(tmp_path / "ddp", model, "ddp.yaml"):
        assert rank["held"] == rank["parameters"]
        assert rank["peak_bytes"] > 4 * rank["parameters"], "the measure sees a whole model where there is one"
