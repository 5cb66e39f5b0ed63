"""A run is told from another one by what it reads, not by where that lies."""

import json
import shutil

import pytest
from tests.launching import TINY

from isotune.config import Recipe
from isotune.io.errors import AlreadyDone, UserError
from isotune.run.identity import RunIdentity
from isotune.run.preemption import RunStatus
from isotune.run.run_dir import RunDir

ROWS = '{"text": "### Human: a\\n### Assistant: b"}\n'


@pytest.fixture
def places(tmp_path):
    """`here` and `there` hold the same bytes: a file of data, and a model with its tokenizer."""
    here = tmp_path / "here"
    (here / "model").mkdir(parents=True)
    (here / "rows.jsonl").write_text(ROWS)
    (here / "model" / "config.json").write_text("{}")
    (here / "model" / "model.safetensors").write_bytes(bytes(range(256)) * 1_000)
    shutil.copytree(here, tmp_path / "there")
    return tmp_path


def recipe(places, where: str, **values) -> Recipe:
    named = {key: str(places / where / "rows.jsonl") for key in ("dataset_name", "eval_dataset_name")}
    model = {
        "model_name_or_path": str(places / where / "model"),
        "tokenizer_name_or_path": str(places / where / "model"),
    }
    return Recipe.from_values(**{**TINY, **named, **model, "output_dir": str(places / "run"), **values})


def change(places, what: str) -> None:
    path = places / "there" / what
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


def test_the_same_bytes_elsewhere_are_the_same_run(places):
    here, there = (RunIdentity.of(recipe(places, where)) for where in ("here", "there"))
    assert here.fingerprint == there.fingerprint and not here.differences(there)
    assert recipe(places, "here").fingerprint() != recipe(places, "there").fingerprint()
    assert RunIdentity.of(recipe(places, "here", seed=7)).differences(there) == {"seed": "seed: 42 there, 7 here"}


@pytest.mark.parametrize(
    ("what", "keys"),
    [
        ("rows.jsonl", {"dataset_name", "eval_dataset_name"}),
        ("model/model.safetensors", {"model_name_or_path", "tokenizer_name_or_path"}),
        ("model/config.json", {"model_name_or_path", "tokenizer_name_or_path"}),
    ],
)
def test_one_other_bit_is_another_run_under_either_name(places, what, keys):
    before = RunIdentity.of(recipe(places, "there"))
    change(places, what)
    after = RunIdentity.of(recipe(places, "there"))
    assert after.differences(before).keys() == keys
    assert "have changed since" in after.differences(before)[min(keys)]
    elsewhere = RunIdentity.of(recipe(places, "here"))
    assert after.differences(elsewhere).keys() == keys
    assert after.fingerprint not in (before.fingerprint, elsewhere.fingerprint)


def test_a_chat_template_in_a_file_is_told_by_its_content(places):
    for where in ("here", "there"):
        (places / where / "chat.jinja").write_text("{{ messages[0].content }}")
    files = {where: str(places / where / "chat.jinja") for where in ("here", "there")}
    own, moved = (RunIdentity.of(recipe(places, where, chat_format=file)) for where, file in files.items())
    assert own.fingerprint == moved.fingerprint and not own.differences(moved)
    (places / "there" / "chat.jinja").write_text("{{ messages[-1].content }}")
    changed = RunIdentity.of(recipe(places, "there", chat_format=files["there"]))
    assert list(changed.differences(moved)) == ["chat_format"] and changed.fingerprint != moved.fingerprint
    assert "have changed since" in changed.differences(moved)["chat_format"]
    assert RunIdentity.of(recipe(places, "here", chat_format="guanaco")).contents.keys() == (
        own.contents.keys() - {"chat_format"}
    )


def test_files_that_are_no_part_of_a_model_do_not_count(places):
    before = RunIdentity.of(recipe(places, "here"))
    (places / "here" / "model" / "README.md").write_text("a card")
    (places / "here" / "model" / "checkpoints").mkdir()
    (places / "here" / "model" / "checkpoints" / "x.json").write_text("{}")
    assert RunIdentity.of(recipe(places, "here")) == before


def test_a_run_directory_is_that_of_the_same_content(places):
    RunDir(recipe(places, "here")).begin({})
    RunDir(recipe(places, "there")).check()
    (places / "run" / "model").mkdir()
    trained = RunDir(recipe(places, "there"))
    trained.check()
    assert trained.is_trained, "nothing says that it is finished"
    RunStatus(places / "run", is_main=True).write("finished", 0)
    with pytest.raises(AlreadyDone):
        RunDir(recipe(places, "there")).check()
    with pytest.raises(UserError, match=r"another recipe \(seed: 42 there, 7 here\)"):
        RunDir(recipe(places, "there", seed=7)).check()
    change(places, "rows.jsonl")
    with pytest.raises(UserError, match=r"\(dataset_name: the contents of .*here/rows.jsonl there, of .*there/rows"):
        RunDir(recipe(places, "there")).check()


def test_a_run_whose_files_are_gone_is_still_itself_by_their_names(places):
    RunDir(recipe(places, "here")).begin({})
    shutil.rmtree(places / "here")
    RunDir(recipe(places, "here")).check()
    with pytest.raises(UserError, match="another recipe"):
        RunDir(recipe(places, "here", seed=7)).check()


def test_a_run_of_an_earlier_version_is_told_by_its_names(places):
    run = RunDir(recipe(places, "here"))
    run.begin({})
    record = json.loads((run.path / "environment.json").read_text())
    record["recipe_fingerprint"] = recipe(places, "here").fingerprint()
    del record["identity"]
    (run.path / "environment.json").write_text(json.dumps(record))
    RunDir(recipe(places, "here")).check()
    with pytest.raises(UserError, match=r"another recipe \(model_name_or_path: "):
        RunDir(recipe(places, "there")).check()
