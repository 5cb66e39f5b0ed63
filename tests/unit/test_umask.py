"""Folders and files of the cache and of a run have the permissions that the user's umask asks for, and no others."""

import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from tests.building import build_classifier

from isotune.data import cache
from isotune.evaluation.prediction.files import PredictionFile
from isotune.evaluation.prediction.predictors import Part
from isotune.report.html_report import write_report
from isotune.report.model_card import write_model_card
from isotune.training.from_recipe import save


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def other_modes(folder: Path, mask: int) -> dict[str, str]:
    """What is in a folder with other permissions than the umask gives, by name."""
    found = {}
    for path in sorted(folder.rglob("*")):
        mode = stat.S_IMODE(path.lstat().st_mode)
        if not path.is_symlink() and mode != (0o777 if path.is_dir() else 0o666) & ~mask:
            found[str(path.relative_to(folder))] = oct(mode)
    return found


@pytest.mark.parametrize("mask", [0o002, 0o027, 0o077])
def test_a_cache_and_predictions_are_the_groups_where_the_umask_says_so(tmp_path, monkeypatch, mask):
    monkeypatch.setenv("ISOTUNE_CACHE", str(tmp_path / "cache"))
    with umask(mask):
        cache.load_or_build("a" * 8, lambda folder: ({"ids": np.arange(3)}, {"rows": 3}))
        file = PredictionFile(tmp_path / "out.csv", {"model_sha256": "a"}, "id")
        file.start()
        file.add(0, Part([{"id": 0, "text": "x"}]))
        assert other_modes(tmp_path, mask) == {}  # the parts too
        file.finish(lambda line: line)
    assert len([*tmp_path.rglob("*")]) >= 7 and other_modes(tmp_path, mask) == {}


def test_a_run_with_its_checkpoint_model_card_and_report_is_the_groups_too(tmp_path, monkeypatch):
    monkeypatch.setenv("ISOTUNE_CACHE", str(tmp_path / "cache"))
    with umask(0o007):
        built = build_classifier(tmp_path / "made", max_steps=1, save_strategy="steps", save_steps=1)
        built.trainer.train()
        save(built.start, built.trainer)
        write_model_card(built.run.path)
        write_report([built.run.path])
    names = {path.name for path in tmp_path.rglob("*")}
    assert {"MANIFEST.json", "model.safetensors", "README.md", "report.html", "metrics.jsonl", "meta.json"} <= names
    assert other_modes(tmp_path, 0o007) == {}


def test_of_many_that_ask_for_an_entry_at_once_one_makes_it(tmp_path, monkeypatch):
    monkeypatch.setenv("ISOTUNE_CACHE", str(tmp_path / "not" / "yet" / "there"))
    made, found, gate = [], [], threading.Barrier(8)

    def build(folder: Path) -> cache.Content:
        made.append(folder)
        return {"ids": np.arange(5)}, {}

    def ask() -> None:
        gate.wait(timeout=60)
        found.append(cache.load_or_build("b" * 8, build)[0]["ids"].tolist())

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(made) == 1 and found == [[0, 1, 2, 3, 4]] * 8
