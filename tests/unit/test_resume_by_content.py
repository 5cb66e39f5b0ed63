"""A checkpoint is of a run by what the run reads: the same bytes elsewhere go on, others under the same path do not."""

import shutil

import pytest
import torch
from tests.launching import TINY

from isotune.checkpoint.manifest import Manifest
from isotune.checkpoint.resume import open_run
from isotune.config import Recipe
from isotune.distributed.launch import Process
from isotune.io.errors import UserError
from isotune.run.run_dir import RunDir

ALONE = Process(0, 1, torch.device("cpu"))


@pytest.fixture
def made(tmp_path):
    """Recipes by the folder of their data, all to resume from a checkpoint of a run over `here`."""

    def recipe(where: str, **values) -> Recipe:
        named = {"dataset_name": str(tmp_path / where / "rows.jsonl"), "output_dir": str(tmp_path / "run")}
        return Recipe.from_values(**{**TINY, **named, "resume": str(tmp_path / "step"), **values})

    for where, content in {"here": "a", "there": "a", "other": "b"}.items():
        (tmp_path / where).mkdir()
        (tmp_path / where / "rows.jsonl").write_text(f'{{"text": "{content}"}}\n')
    (tmp_path / "step").mkdir()
    return recipe


def write_manifest(run: RunDir, folder, **changes) -> None:
    values = {
        "step": 1, "world_size": 1, "engine": "plain", "recipe": run.identity.values, "data_fingerprints": {},
        "recipe_fingerprint": run.identity.fingerprint, "contents": run.identity.contents, "versions": {},
        "best_step": None, "best_metric": None,
    }  # fmt: skip
    Manifest(**{**values, **changes}).write(folder)


def test_the_same_bytes_elsewhere_go_on_and_others_are_refused(made, tmp_path):
    write_manifest(RunDir(made("here")), tmp_path / "step")
    for where in ("here", "there"):
        open_run(made(where), ALONE)
    shutil.rmtree(tmp_path / "here")
    open_run(made("there"), ALONE)
    with pytest.raises(UserError, match=r"dataset_name: the contents of .*/here/rows.jsonl there, of .*/other/"):
        open_run(made("other"), ALONE)
    with pytest.raises(UserError, match=r"another recipe \(seed: 42 there, 3 here\)"):
        open_run(made("there", seed=3), ALONE)


def test_other_bytes_under_the_same_path_are_refused(made, tmp_path):
    write_manifest(RunDir(made("here")), tmp_path / "step")
    (tmp_path / "here" / "rows.jsonl").write_text('{"text": "c"}\n')
    with pytest.raises(UserError, match=r"dataset_name: the contents of .*/here/rows.jsonl have changed since"):
        open_run(made("here"), ALONE)


def test_a_checkpoint_of_an_earlier_version_is_told_by_names(made, tmp_path):
    recipe = made("here")
    write_manifest(RunDir(recipe), tmp_path / "step", contents={}, recipe_fingerprint=recipe.fingerprint())
    open_run(recipe, ALONE)
    with pytest.raises(UserError, match=r"dataset_name: .*/here/rows.jsonl there, .*/there/rows.jsonl here"):
        open_run(made("there"), ALONE)
