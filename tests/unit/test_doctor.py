"""A doctor sees what is wrong, says why and what to do, and one process's trouble is told with its rank."""

import os
from pathlib import Path

import pytest

from isotune import doctor
from isotune.doctor import (
    NOTE,
    OK,
    WRONG,
    Finding,
    all_reduce,
    caches,
    compilers,
    disk,
    format_table,
    hub,
    kernels,
    scheduler,
)


def verdicts(findings) -> dict[str, str]:
    return {finding.subject: finding.status for finding in findings}


def test_the_kernel_of_this_machine_is_right():
    assert verdicts(kernels()) == {"attention": OK}


def test_a_kernel_that_computes_something_else_is_seen(monkeypatch):
    right = doctor.packed_attention
    monkeypatch.setattr(doctor, "packed_attention", lambda *a, **k: (right(*a, **k)[0] * 1.1, None))
    assert verdicts(kernels()) == {"attention": WRONG}


def test_a_folder_that_cannot_be_written_is_wrong_and_a_slow_disk_is_noted(tmp_path, monkeypatch):
    assert "free" in next(disk(tmp_path / "not" / "there" / "yet")).result
    monkeypatch.setattr(doctor, "SLOW_SYNC_SECONDS", 0.0)
    assert verdicts(disk(tmp_path)) == {"output": NOTE}

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor.tempfile, "NamedTemporaryFile", refuse)
    (finding,) = disk(tmp_path)
    assert finding.status == WRONG and "Permission denied" in finding.result and "--output_dir" in finding.fix


def test_caches_that_cannot_be_written_are_wrong(monkeypatch):
    assert set(verdicts(caches()).values()) == {OK}
    monkeypatch.setattr(os, "access", lambda *_: False)
    found = list(caches())
    assert {f.status for f in found} == {WRONG} and "ISOTUNE_CACHE" in found[0].fix


def test_a_lock_that_a_killed_build_left_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert "lock" not in verdicts(compilers())
    (tmp_path / "py311" / "op").mkdir(parents=True)
    (tmp_path / "py311" / "op" / "lock").touch()
    (lock,) = [f for f in compilers() if f.subject == "lock"]
    assert lock.status == WRONG and "rm" in lock.fix


def test_versions_out_of_range_or_untested_are_told(monkeypatch):
    assert WRONG not in verdicts(doctor.versions()).values()
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "0.0.1")
    assert verdicts(doctor.versions())["torch"] == WRONG
    monkeypatch.undo()
    monkeypatch.setattr(doctor, "_tested_together", lambda: {"numpy": doctor.Version("2.2.1")})
    (note,) = [f for f in doctor.versions() if f.subject == "numpy"]
    assert note.status == NOTE and "2.2.1 was tested" in note.result


@pytest.mark.parametrize(
    ("environment", "verdict"),
    [
        ({"SLURM_STEP_NUM_TASKS": "4"}, WRONG),
        ({"SLURM_NNODES": "2", "WORLD_SIZE": "3"}, WRONG),
        ({"SLURM_NNODES": "2", "WORLD_SIZE": "4"}, OK),
    ],
)
def test_slurm_and_the_launcher_must_agree(environment, verdict):
    assert verdicts(scheduler({"SLURM_JOB_ID": "7", **environment})) == {"SLURM": verdict}
    assert list(scheduler({})) == []


def test_more_threads_than_cores_are_noted():
    found = scheduler({"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "2", "OMP_NUM_THREADS": "8"})
    assert verdicts(found)["threads"] == NOTE


def test_being_offline_on_purpose_is_no_trouble(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert verdicts(hub()) == {"Hub": OK}


def test_the_table_says_once_what_all_found_and_names_the_rank_of_the_rest():
    alike = Finding(OK, "Hub", "reachable")
    broken = Finding(WRONG, "output", "/x: read-only", "a run could write nothing", "elsewhere")
    said = format_table({0: [alike], 1: [alike, broken]}).splitlines()
    assert said[0].split() == ["ok", "Hub", "reachable"]
    assert "(rank 1)" in said[1] and said[1].startswith("WRONG") and said[1].endswith("elsewhere")
    assert said[-1] == "1 wrong, 0 to note"


def test_one_process_has_no_bandwidth():
    import torch

    from isotune.evaluation.distributed_eval import Ranks

    assert list(all_reduce(Ranks(0, 1, torch.device("cpu")))) == []


def test_a_missing_output_folder_is_not_made(tmp_path: Path):
    list(disk(tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()
