"""A checkpoint is taken only if every byte is what its manifest says, and goes only when a later one is valid."""

import dataclasses
import errno
import hashlib
import io
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from isotune.checkpoint import store as store_module
from isotune.checkpoint.flat_tensors import FlatTensor
from isotune.checkpoint.manifest import MANIFEST, InvalidCheckpoint, Manifest, verify
from isotune.checkpoint.resume import find_resumption
from isotune.checkpoint.store import CheckpointStore, is_checkpoint
from isotune.checkpoint.writer import CheckpointWriter, Snapshot
from isotune.io.errors import UserError
from isotune.io.files import replace_file


def manifest(step: int, best: int | None = None) -> Manifest:
    return Manifest(
        step=step,
        world_size=1,
        engine="Model",
        recipe_fingerprint="f",
        recipe={"seed": 1},
        data_fingerprints={"train": "d"},
        versions={"torch": "2"},
        best_step=best,
        best_metric=None,
    )


def write(store: CheckpointStore, step: int, best: int | None = None) -> Path:
    writer = CheckpointWriter(store, lambda step: None)
    tensors = {"model/w": FlatTensor.whole(torch.full((1000,), float(step)))}
    writer.start(Snapshot(tensors, {"state.json": json.dumps({"step": step})}, manifest(step, best)))
    writer.wait()
    return store.path / f"step-{step:08d}"


@pytest.fixture
def store(tmp_path) -> CheckpointStore:
    store = CheckpointStore(tmp_path / "checkpoints", limit=10)
    write(store, 1)
    write(store, 2)
    return store


def names(store: CheckpointStore) -> list[str]:
    return sorted(path.name for path in store.path.iterdir())


def test_what_was_written_verifies_and_nothing_else_lies_there(store):
    assert names(store) == ["step-00000001", "step-00000002"]
    found = store.newest_valid()
    assert found.folder == store.path / "step-00000002" and not found.skipped
    assert found.manifest is not None
    listed = {file.name for file in found.manifest.files}
    there = {path.relative_to(found.folder).as_posix() for path in found.folder.rglob("*") if path.is_file()}
    assert there == listed | {MANIFEST}


def _truncate(folder: Path) -> None:
    file = next((folder / "tensors").iterdir())
    file.write_bytes(file.read_bytes()[:-1])


def _flip(folder: Path) -> None:
    file = next((folder / "tensors").iterdir())
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def _flip_state(folder: Path) -> None:
    (folder / "state.json").write_text((folder / "state.json").read_text().replace("2", "3"))


def _lose_shard(folder: Path) -> None:
    next((folder / "tensors").iterdir()).unlink()


def _lose_all(folder: Path) -> None:
    for file in (folder / "state.json", *(folder / "tensors").iterdir()):  # the first by its name is named
        file.unlink()


def _lose_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()


def _half_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_text((folder / MANIFEST).read_text()[:100])


def _edit_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_text((folder / MANIFEST).read_text().replace('"seed": 1', '"seed": 2'))


def _add_shard(folder: Path) -> None:
    file = next((folder / "tensors").iterdir())
    for number in (2, 3):  # the first is named
        shutil.copy(file, file.with_name(f"shard-0000{number}-model-00001-of-00001.safetensors"))


FAULTS = [
    (_truncate, r"has \d+ bytes and not \d+"),
    (_flip, "is not what was written"),
    (_flip_state, "state.json is not what was written"),
    (_lose_shard, "is missing"),
    (_lose_all, r"^state\.json is missing"),
    (_lose_manifest, "has no MANIFEST.json"),
    (_half_manifest, "MANIFEST.json is broken"),
    (_edit_manifest, "MANIFEST.json was changed"),
    (_add_shard, "shard-00002-model-00001-of-00001.safetensors does not belong to it"),
]


@pytest.mark.parametrize(("harm", "why"), FAULTS, ids=lambda value: getattr(value, "__name__", None))
def test_a_harmed_checkpoint_is_skipped_with_the_reason_and_the_one_before_it_taken(store, harm, why):
    newest = store.path / "step-00000002"
    harm(newest)
    found = store.newest_valid()
    assert found.folder == store.path / "step-00000001"
    ((passed, reason),) = found.skipped
    assert passed == newest
    with pytest.raises(InvalidCheckpoint, match=why):
        verify(newest)
    with pytest.raises(InvalidCheckpoint, match=why):
        verify(newest)
    assert reason


def test_nothing_is_chosen_where_nothing_is_whole(store):
    for folder in store.folders():
        _lose_manifest(folder)
    found = store.newest_valid()
    assert found.folder is None and len(found.skipped) == 2


def test_a_folder_that_was_being_written_is_no_checkpoint_and_is_cleaned_up(store):
    staging = store.stage(3)
    (staging / "half").write_text("")
    assert store.newest_valid().folder == store.path / "step-00000002"
    store.clean()
    assert names(store) == ["step-00000001", "step-00000002"]


def test_a_replacement_that_was_killed_half_way_is_undone(store):
    (store.path / "step-00000002").rename(store.path / ".step-00000002.before")
    store.clean()
    assert store.newest_valid().folder == store.path / "step-00000002"
    verify(store.path / "step-00000002")


def test_a_step_that_is_written_again_takes_the_place_of_the_first(store):
    before = verify(store.path / "step-00000002")
    writer = CheckpointWriter(store, lambda step: None)
    writer.start(Snapshot({"model/w": FlatTensor.whole(torch.ones(3))}, {}, manifest(2)))
    writer.wait()
    assert verify(store.path / "step-00000002") != before
    assert names(store) == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize(
    ("limit", "best", "kept"),
    [
        (1, None, [4]),
        (2, None, [3, 4]),
        (2, 1, [1, 4]),
        (3, 1, [1, 3, 4]),
        (1, 1, [1, 4]),
        *((limit, None, [1, 2, 3, 4]) for limit in (4, 5, 6, 9, None)),
    ],
)
def test_the_newest_and_the_best_are_kept_under_the_limit(tmp_path, limit, best, kept):
    store = CheckpointStore(tmp_path, limit)
    for step in (1, 2, 3, 4):
        write(store, step, best)
    assert names(store) == [f"step-{step:08d}" for step in kept]


def test_every_folder_of_a_checkpoint_is_synced_and_the_one_that_names_it(tmp_path, monkeypatch):
    synced: list[str] = []
    monkeypatch.setattr(store_module, "sync_path", lambda path: synced.append(path.name))
    write(CheckpointStore(tmp_path / "not/yet/there"), 7)
    *within, last = synced
    assert sorted(within) == sorted(["tensors", within[-1]]) and within[-1].startswith(".step-00000007.tmp-")
    assert last == "there", "after its new name"


def test_a_checkpoint_that_is_gone_already_is_removed_without_a_word(store):
    folder = store.path / "step-00000002"
    shutil.rmtree(folder)
    store._remove(folder)
    assert names(store) == ["step-00000001"]


def test_a_checkpoint_is_told_by_its_manifest_or_its_name(store, tmp_path):
    folder = store.path / "step-00000002"
    assert is_checkpoint(folder)
    renamed = folder.rename(tmp_path / "moved")
    assert is_checkpoint(renamed), "by its manifest"
    (renamed / MANIFEST).unlink()
    assert not is_checkpoint(renamed)
    assert is_checkpoint(renamed.rename(tmp_path / "step-00000002")), "by its name"
    assert not is_checkpoint(tmp_path)


def test_no_checkpoint_is_removed_before_the_next_one_is_valid(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path, limit=1)
    write(store, 1)
    valid_at_removal = []
    remove = shutil.rmtree

    def watched(path: Path, **how) -> None:
        valid_at_removal.append(store.newest_valid().folder)
        remove(path, **how)

    monkeypatch.setattr(shutil, "rmtree", watched)
    write(store, 2)
    assert valid_at_removal and all(folder is not None for folder in valid_at_removal)
    assert names(store) == ["step-00000002"]


def test_checkpoints_of_an_abandoned_life_go_first(tmp_path):
    store = CheckpointStore(tmp_path, limit=2)
    for step in (1, 9):
        write(store, step)
    write(store, 2)
    assert names(store) == ["step-00000001", "step-00000002"]


def test_a_file_is_replaced_at_one_stroke(tmp_path):
    file = tmp_path / "status.json"
    replace_file(file, "one")
    replace_file(file, "two")
    assert file.read_text() == "two" and names(CheckpointStore(tmp_path)) == ["status.json"]


@pytest.mark.parametrize("other", [0, 2, 99, 2**40])
def test_a_manifest_of_another_format_is_refused(store, other):
    folder = store.path / "step-00000002"
    assert verify(folder).format == 1, "a change of the format is a promise broken to those who have checkpoints"
    dataclasses.replace(verify(folder), format=other).write(folder)
    with pytest.raises(InvalidCheckpoint, match=f"its format is {other}"):
        verify(folder)


def test_a_field_that_this_version_does_not_know_is_a_broken_manifest(store):
    folder = store.path / "step-00000002"
    content = json.loads((folder / MANIFEST).read_text()) | {"later": 1}
    del content["digest"]
    content["digest"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(InvalidCheckpoint, match=r"is broken: .*later"):
        verify(folder)


@pytest.mark.parametrize("harm", range(8))
def test_a_hash_that_is_larger_and_one_that_is_smaller_both_differ(store, harm):
    """Each of these has a chance of one half to be larger than the one before."""
    folder = store.path / "step-00000002"
    manifest = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(manifest.replace('"seed": 1', f'"seed": {harm + 2}'))
    with pytest.raises(InvalidCheckpoint, match=r"MANIFEST\.json was changed"):
        verify(folder)
    (folder / MANIFEST).write_text(manifest)
    state = (folder / "state.json").read_bytes()
    (folder / "state.json").write_bytes(bytes([state[0] ^ (harm + 1)]) + state[1:])
    with pytest.raises(InvalidCheckpoint, match=r"state\.json is not what was written"):
        verify(folder)


PASSING = [errno.EIO, errno.ESTALE, errno.EACCES, errno.ENOTCONN, errno.ETIMEDOUT, errno.ENOMEM]


@pytest.mark.parametrize(
    ("module", "call", "of"),
    [
        (os, "open", "step-00000002/MANIFEST.json"),
        (os, "scandir", "step-00000002/tensors"),
        (os, "stat", "step-00000002/tensors/shard"),
        (os, "scandir", "checkpoints"),
        (io, "open", "step-00000002/tensors/shard"),
        (io, "read", "step-00000002/tensors/shard"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
@pytest.mark.parametrize("number", PASSING, ids=errno.errorcode.get)
def test_an_error_of_the_file_system_ends_the_start_and_no_older_checkpoint_is_taken(
    store, monkeypatch, capsys, module, call, of, number
):
    """It may pass, and what an older checkpoint went on with would remove the newer ones."""
    real = getattr(module, call, io.open)
    error = OSError(number, os.strerror(number))

    def failing(path: Any, *args: Any, **options: Any) -> Any:
        at = str(path)
        if of not in at or (of == "checkpoints" and at != str(store.path)):
            return real(path, *args, **options)
        if call == "read":  # whose errors name no file
            opened = mock.mock_open()()
            opened.read.side_effect = error
            return opened
        raise OSError(number, os.strerror(number), at)

    run: Any = SimpleNamespace(recipe=SimpleNamespace(resume="auto"))
    with monkeypatch.context() as patched:
        patched.setattr(module, "open" if call == "read" else call, failing)
        with pytest.raises(UserError, match=rf"{of}\S* cannot be read: {os.strerror(number)}; run again"):
            find_resumption(store, run, {}, SimpleNamespace(is_main=True))  # type: ignore[arg-type]
    assert "skipped" not in capsys.readouterr().out
    assert store.newest_valid().folder == store.path / "step-00000002"


def test_a_checkpoint_is_verified_on_a_file_system_that_syncs_nothing(store, monkeypatch):
    def refuse(descriptor: int) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "fsync", refuse)
    assert verify(store.path / "step-00000002").step == 2


@pytest.mark.parametrize("other", ["a folder", "a link to itself", "a link to nothing"])
@pytest.mark.parametrize("name", ["MANIFEST.json", "state.json"])
def test_what_is_no_file_where_one_should_be_is_damage(store, name, other):
    file = store.path / "step-00000002" / name
    file.unlink()
    if other == "a folder":
        file.mkdir()
    else:
        file.symlink_to(name if other == "a link to itself" else "nothing")
    assert store.newest_valid().folder == store.path / "step-00000001"
