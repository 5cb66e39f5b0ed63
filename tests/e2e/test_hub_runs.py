"""The commands that name the Hub, run to their end against one: default recipes, one or two processes, then offline."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from tests.hub_stand_in import repositories as real
from tests.hub_stand_in.client import Client, settings
from tests.hub_stand_in.server import HubStandIn
from tests.launching import Finished, launcher, run_command

SMALL = {"max_steps": "2", "max_seq_length": "64", "disable_tqdm": "true", "global_batch_size": "5"}
TOKEN = "hf_PrivateTokenOfATest"


def train(
    hub: HubStandIn, caches: Path, run: Path, script: str, *words: str, processes: int = 0, fresh: bool = False,
    small: dict[str, str] | None = None, **more: str,
) -> Finished:  # fmt: skip
    """A training script with its default recipe, made small by flags alone."""
    flags = [word for key, value in (SMALL | (small or {})).items() for word in (f"--{key}", value)]
    start = launcher("ddp.yaml", processes) if processes else [sys.executable]
    command = [*start, script, *words, *flags, "--output_dir", str(run)]
    done = run_command(command, settings(hub, caches, **more), fresh=fresh)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return Finished(done.returncode, done.stdout, done.stderr, run)


def evaluate(hub: HubStandIn, caches: Path, script: str, *words: str, **more: str) -> str:
    done = run_command([sys.executable, script, *words], settings(hub, caches, **more))
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def losses(run: Finished) -> list[float]:
    return [step["loss"] for step in run.steps]


def test_two_processes_download_once_and_one_offline_trains_the_same_bits(hub, tmp_path, monkeypatch):
    script = "train/sft_opt.py"
    online = train(hub, tmp_path, tmp_path / "two", script, processes=2, HF_TOKEN=TOKEN)
    counts = hub.downloads()
    assert set(counts.values()) == {1} and {"pytorch_model.bin", "vocab.json", "merges.txt"} < set(counts)
    assert not any("refs/pr" in request.path for request in hub.requests)
    asked = [r for r in hub.requests if r.path in (f"/api/models/{real.OPT}", f"/api/datasets/{real.GUANACO}")]
    assert len(asked) == 2, "one rank asks for the commits"
    everything = b"".join(path.read_bytes() for path in online.run.rglob("*") if path.is_file())
    assert TOKEN not in online.stdout + online.stderr and TOKEN.encode() not in everything
    model, data = online.environment["hub"]
    opt = hub.repositories["model", real.OPT]
    assert (model["repository"], model["commit"]) == (real.OPT, opt.refs["main"])
    assert data["repository"] == real.GUANACO and len(data["files"]) == 2
    assert "are a pickle (pytorch_model.bin): torch's restricted unpickler" in online.stderr

    hub.forget()
    offline = train(hub, tmp_path, tmp_path / "one", script, HF_HUB_OFFLINE="1")
    assert not hub.requests
    assert losses(offline) == losses(online) and offline.environment["hub"] == online.environment["hub"]
    tensors = [load_file(run.run / "model" / "adapter_model.safetensors") for run in (online, offline)]
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])

    # somebody pushes; the adapter still finds the base that it was trained on, here and in peft
    first = opt.commits[opt.refs["main"]]
    moved = {**first, "pytorch_model.bin": real.pickled({"decoder.embed_tokens.weight": torch.zeros(512, 16)})}
    opt.commit(moved)
    command = ["--run_dir", str(online.run), "--dataset_name", real.GUANACO, "--max_new_tokens", "4", "--limit", "2"]
    assert "exact_match" in evaluate(hub, tmp_path, "eval/generate.py", *command)
    Client(monkeypatch).start(hub, tmp_path)
    base = AutoPeftModelForCausalLM.from_pretrained(online.run / "model").get_base_model()
    assert base.model.decoder.embed_tokens.weight.abs().max() > 0
    opt.commit(first)
    monkeypatch.undo()
    Client.reload()


RUNS: dict[str, tuple[str, list[str], dict[str, Any]]] = {
    "opt lora": ("train/sft_opt.py", [], {}),
    "opt full": ("train/sft_opt.py", ["--config", "train/configs/opt350m_full.yaml"], {}),
    "opt qlora": ("train/sft_opt.py", ["--config", "train/configs/opt350m_qlora.yaml"], {}),
    "yelp": ("train/yelp.py", [], {}),
    "yelp, lora": ("train/yelp.py", ["--tune", "lora"], {}),
    "imdb": ("train/imdb.py", [], {}),
    "imdb, bert": ("train/imdb.py", ["--config", "train/configs/imdb_bert.yaml"], {}),
    "prompts": ("train/prompts.py", [], {"eval_split_share": "0.2"}),
    "old names": ("train/imdb.py", ["--model_name_or_path", "distilbert-base-uncased", "--dataset_name", "imdb",
                                    "--eval_dataset_name", "imdb"], {}),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_every_default_recipe_runs_to_its_end_and_again_offline(hub, tmp_path, name):
    script, words, small = RUNS[name]
    hub.forget()
    online = train(hub, tmp_path, tmp_path / "two", script, *words, small=small, processes=2)
    counts = hub.downloads()
    cards = counts.pop("README.md")
    assert set(counts.values()) == {1} and cards <= 2
    assert not any(path.endswith((".h5", ".msgpack", ".ot")) for path in counts)
    hub.forget()
    offline = train(hub, tmp_path, tmp_path / "one", script, *words, small=small, HF_HUB_OFFLINE="1")
    assert not hub.requests
    assert losses(offline) == pytest.approx(losses(online), rel=1e-3)  # bf16, and not all sums are exact
    assert offline.environment["hub"] == online.environment["hub"]
    assert offline.environment["data_fingerprints"] == online.environment["data_fingerprints"]


@pytest.mark.slow
def test_the_evaluations_run_on_the_hubs_data_and_models_and_again_offline(hub, tmp_path):
    runs = {name: tmp_path / name for name in ("yelp", "imdb", "sft")}
    train(hub, tmp_path, runs["yelp"], "train/yelp.py")
    train(hub, tmp_path, runs["imdb"], "train/imdb.py")
    train(hub, tmp_path, runs["sft"], "train/sft_opt.py")
    for more in ({}, {"HF_HUB_OFFLINE": "1"}):
        for name in ("yelp", "imdb"):
            task = ["--run_dir", str(runs[name]), "--task", f"eval/configs/{name}.yaml"]
            assert "accuracy" in evaluate(hub, tmp_path, "eval/classify.py", *task, **more)
        task = ["--run_dir", str(runs["sft"]), "--task", "eval/configs/guanaco.yaml", "--max_new_tokens", "4"]
        assert "rouge" in evaluate(hub, tmp_path, "eval/generate.py", *task, **more).lower()
        task = ["--model", real.OPT, "--dataset_name", real.GUANACO, "--max_new_tokens", "4", "--limit", "2",
                "--output_dir", str(tmp_path / "base")]  # fmt: skip
        assert "rouge" in evaluate(hub, tmp_path, "eval/generate.py", *task, **more).lower()


@pytest.mark.slow
def test_a_fresh_interpreter_finds_the_hub_by_its_environment(hub, tmp_path):
    done = train(hub, tmp_path, tmp_path / "run", "train/sft_opt.py", fresh=True)
    assert [entry["repository"] for entry in done.environment["hub"]] == [real.OPT, real.GUANACO]
    assert json.loads((done.run / "model" / "adapter_config.json").read_text())["revision"]
