"""A user's mistake costs one sentence that names its place, exit status 2, and nothing written."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tests.launching import REPOSITORY, TINY, start


def run_in_process(folder: Path, recipe: dict, capsys, monkeypatch) -> tuple[int, str]:
    """The shipped script in this process (its libraries are loaded once for all tests); status and stderr."""
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump({"output_dir": str(folder / "run"), **recipe}))
    monkeypatch.setattr(sys, "argv", ["sft_opt.py", "--config", str(file)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as leaving:
        runpy.run_path(str(REPOSITORY / "train" / "sft_opt.py"), run_name="__main__")
    return int(leaving.value.code or 0), capsys.readouterr().err


def tiny_model(folder: Path, **config) -> Path:
    """A random OPT of the smallest size, saved as a user's local model."""
    from transformers import OPTConfig, OPTForCausalLM

    from isotune.models.base.builtin import builtin_tokenizer

    tokenizer = builtin_tokenizer("builtin:opt-tiny")
    small = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 2, "max_position_embeddings": 64, "vocab_size": len(tokenizer)}
    OPTForCausalLM(OPTConfig(**{**small, **config})).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def lines_of(folder: Path, *rows: str) -> str:
    file = folder / "rows.jsonl"
    file.write_text("\n".join(rows) + "\n")
    return str(file)


GOOD = json.dumps({"text": "### Human: a\n### Assistant: b"})


def missing_file(folder: Path) -> tuple[dict, list[str]]:
    return {"dataset_name": str(folder / "none.jsonl")}, ["none.jsonl"]


def empty_file(folder: Path) -> tuple[dict, list[str]]:
    (folder / "empty.jsonl").touch()
    return {"dataset_name": str(folder / "empty.jsonl")}, ["empty.jsonl"]


def broken_json(folder: Path) -> tuple[dict, list[str]]:
    return {"dataset_name": lines_of(folder, GOOD, GOOD, '{"text": "unfinished')}, ["rows.jsonl", "line 3"]


def wrong_columns(folder: Path) -> tuple[dict, list[str]]:
    rows = lines_of(folder, json.dumps({"question": "a", "reply": "b"}))
    return {"dataset_name": rows}, ["question", "reply", "text"]


def a_hub_data_set_without_a_network(folder: Path) -> tuple[dict, list[str]]:
    return {"dataset_name": "timdettmers/openassistant-guanaco"}, ["timdettmers/openassistant-guanaco", "builtin:"]


def a_hub_model_without_a_network(folder: Path) -> tuple[dict, list[str]]:
    return {"model_name_or_path": "facebook/opt-350m"}, ["facebook/opt-350m", "local folder"]


def a_model_folder_that_is_not_there(folder: Path) -> tuple[dict, list[str]]:
    return {"model_name_or_path": str(folder / "nowhere")}, ["nowhere"]


def a_tokenizer_without(role: str):
    def prepare(folder: Path) -> tuple[dict, list[str]]:
        model = tiny_model(folder / "m")
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            file = model / name
            if file.exists():
                kept = {k: v for k, v in json.loads(file.read_text()).items() if k != f"{role}_token"}
                file.write_text(json.dumps(kept))
        return {"model_name_or_path": str(model), "max_seq_length": 64}, [role, str(model)]

    prepare.__name__ = f"a_tokenizer_without_{role}"
    return prepare


def rows_longer_than_the_positions(folder: Path) -> tuple[dict, list[str]]:
    return {"max_seq_length": 4096}, ["max_seq_length", "4096", "512"]


def an_unknown_lora_target(folder: Path) -> tuple[dict, list[str]]:
    return {"tune": "lora", "target_modules": ["q_prj"]}, ["q_prj", "q_proj"]


def both_half_precisions(folder: Path) -> tuple[dict, list[str]]:
    return {"bf16": True, "fp16": True}, ["bf16", "fp16"]


def a_truncated_weight_file(folder: Path) -> tuple[dict, list[str]]:
    model = tiny_model(folder / "m")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    return {"model_name_or_path": str(model), "max_seq_length": 64}, ["model.safetensors"]


def weights_of_another_geometry(folder: Path) -> tuple[dict, list[str]]:
    model = tiny_model(folder / "m")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    return {"model_name_or_path": str(model), "max_seq_length": 64}, ["lack", "layers.1"]


def an_unknown_builtin_model(folder: Path) -> tuple[dict, list[str]]:
    return {"model_name_or_path": "builtin:opt-tny"}, ["opt-tny", "opt-tiny"]


MISTAKES = [
    missing_file,
    empty_file,
    broken_json,
    wrong_columns,
    a_hub_data_set_without_a_network,
    a_hub_model_without_a_network,
    a_model_folder_that_is_not_there,
    a_tokenizer_without("eos"),
    rows_longer_than_the_positions,
    an_unknown_lora_target,
    both_half_precisions,
    a_truncated_weight_file,
    weights_of_another_geometry,
    an_unknown_builtin_model,
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda m: m.__name__)
def test_a_mistake_is_one_sentence_with_status_2_and_nothing_written(tmp_path, capsys, monkeypatch, mistake):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    changes, named = mistake(tmp_path)
    status, said = run_in_process(tmp_path, {**TINY, **changes}, capsys, monkeypatch)
    assert status == 2, said
    sentences = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(sentences) == 1, said
    assert "Traceback" not in said
    for word in named:
        assert word in sentences[0]
    assert not (tmp_path / "run").exists()


def test_the_process_itself_leaves_with_status_2(tmp_path):
    done = start(tmp_path, {**TINY, "dataset_name": str(tmp_path / "none.jsonl")}, expect=2)
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: ")
    assert not done.run.exists()


def test_another_recipes_folder_is_refused_and_left_as_it_was(tmp_path, capsys, monkeypatch):
    start(tmp_path, {**TINY, "max_steps": 1})
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    changed = {**TINY, "max_steps": 1, "learning_rate": 5e-4}
    status, said = run_in_process(tmp_path, changed, capsys, monkeypatch)
    assert status == 2 and "learning_rate" in said and "another recipe" in said
    # the same recipe again is no mistake: there is nothing left to do
    assert run_in_process(tmp_path, {**TINY, "max_steps": 1}, capsys, monkeypatch) == (0, "")
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before


def test_a_folder_that_holds_something_else_is_refused(tmp_path, capsys, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    status, said = run_in_process(tmp_path, TINY, capsys, monkeypatch)
    assert status == 2 and "holds no run" in said
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.txt"]


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="mounting a small file system needs root")
def test_a_disk_without_room_is_said_before_training(tmp_path, capsys, monkeypatch):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        status, said = run_in_process(tmp_path, {**TINY, "output_dir": str(disk / "run")}, capsys, monkeypatch)
        assert status == 2 and str(disk) in said and "MB free" in said
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)
