"""A run that is asked to upload its model is saved first; the Hub may fail, and nothing tells the token."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import constants
from tests.launching import TINY_CLASSIFIER, start

from isotune.checkpoint.resume import open_run
from isotune.config import ClassificationRecipe
from isotune.distributed.launch import Process
from isotune.io.errors import AlreadyDone, UserError
from isotune.report.model_card import write_model_card
from isotune.run.finishing import upload_missing
from isotune.run.hub import upload_model
from isotune.run.run_dir import RunDir

ALONE = Process(0, 1, torch.device("cpu"))

TOKEN = "hf_VeryPrivateTokenOfATest"
ASKED = {"push_to_hub": True, "hub_model_id": "someone/tiny", "hub_private_repo": True}


class FakeHub(ThreadingHTTPServer):
    """The few answers of the Hub that an upload of small files asks for; it keeps what it was sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.files: dict[str, bytes] = {}
        self.created: list[dict] = []
        self.tokens: set[str | None] = set()
        self.refuses = False
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class _Answers(BaseHTTPRequestHandler):
    server: FakeHub

    def log_message(self, *_: object) -> None:
        pass

    def _say(self, status: int, answer: object) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self._say(200, {})

    def do_GET(self) -> None:
        self._say(200, {"id": "someone/tiny", "sha": "0" * 40, "siblings": []})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.tokens.add(self.headers.get("Authorization"))
        if self.server.refuses:
            self._say(403, {"error": f"Forbidden for {TOKEN}"})
        elif self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            self._say(200, {"url": f"{self.server.url}/someone/tiny", "name": "someone/tiny"})
        elif self.path == "/api/validate-yaml":  # the library asks it of every README.md
            self._say(200, {"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            told = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
            self._say(200, {"files": told})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self._say(
                200,
                {
                    "success": True,
                    "commitOid": "1" * 40,
                    "commitUrl": f"{self.server.url}/someone/tiny/commit/{'1' * 40}",
                },
            )
        else:
            self._say(404, {"error": self.path})


@pytest.fixture
def hub(monkeypatch):
    server = FakeHub()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """A run that was trained with the token in its environment, where the Hub is a port that nobody listens at."""
    folder = tmp_path_factory.mktemp("offline")
    return start(
        folder, {**TINY_CLASSIFIER, **ASKED, "max_steps": 2}, script="train/imdb.py", expect=2,
        environment={"HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": TOKEN},
    )  # fmt: skip


def everything(folder: Path) -> bytes:
    """All bytes of all files below a folder, and their names."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return b"".join(str(path).encode() + path.read_bytes() for path in files)


def recipe_of(folder: Path, **more: object) -> ClassificationRecipe:
    return ClassificationRecipe.from_values(**yaml.safe_load((folder / "recipe.yaml").read_text()), **more)


def test_without_a_network_the_run_is_saved_and_one_sentence_says_what_is_left(offline):
    (sentence,) = [line for line in offline.stderr.splitlines() if line.startswith("error:")]
    assert "push_to_hub cannot reach the Hugging Face Hub" in sentence and str(offline.run / "model") in sentence
    assert "Traceback" not in offline.stderr
    assert json.loads((offline.run / "status.json").read_text())["status"] == "finished"
    assert (offline.run / "model" / "model.safetensors").is_file()
    assert "someone/tiny" in (offline.run / "model" / "README.md").read_text()


def test_the_token_is_neither_printed_nor_written(offline):
    assert TOKEN not in offline.stdout + offline.stderr
    assert TOKEN.encode() not in everything(offline.run)


def test_the_same_command_uploads_what_was_saved_and_then_has_nothing_left_to_do(offline, hub):
    before = everything(offline.run / "model")
    recipe = recipe_of(offline.run)
    hub.refuses = True
    with pytest.raises(UserError, match=r"push_to_hub to someone/tiny failed: .*upload alone again") as refused:
        open_run(recipe, ALONE)
    assert TOKEN not in str(refused.value) and "\n" not in str(refused.value)
    hub.refuses = False
    with pytest.raises(AlreadyDone, match=r"it is uploaded to .*someone/tiny"):
        open_run(recipe, ALONE)
    assert json.loads((offline.run / "status.json").read_text())["finishing"][-1] == "upload"
    files = {p.relative_to(offline.run / "model").as_posix(): p for p in (offline.run / "model").rglob("*")}
    assert hub.files == {name: path.read_bytes() for name, path in files.items()}
    assert hub.created[0]["name"] == "tiny" and hub.created[0]["organization"] == "someone"
    assert hub.created[0].get("private") is True or hub.created[0].get("visibility") == "private"
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert everything(offline.run / "model") == before and TOKEN.encode() not in everything(offline.run)
    hub.files.clear()
    with pytest.raises(AlreadyDone, match=r"it is uploaded to .*someone/tiny"):
        open_run(recipe, ALONE)
    assert not hub.files


def test_without_a_token_one_sentence_says_where_to_get_one(hub, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    hub_keys = {"push_to_hub": True, "hub_model_id": "someone/tiny"}
    recipe = ClassificationRecipe.from_values(**TINY_CLASSIFIER, output_dir=str(tmp_path), **hub_keys)
    with pytest.raises(UserError, match="push_to_hub has no token: log in with `hf auth login` or set HF_TOKEN"):
        upload_model(recipe)
    assert not hub.created


def test_the_card_that_is_uploaded_loads_from_the_owner_whom_the_hub_names(hub, tmp_path):
    recipe = ClassificationRecipe.from_values(
        **TINY_CLASSIFIER, output_dir=str(tmp_path), push_to_hub=True, hub_model_id="tiny"
    )
    recipe.write(tmp_path / "recipe.yaml")
    (tmp_path / "model").mkdir()
    write_model_card(tmp_path, recipe.hub_model_id)
    upload_model(recipe)
    card = hub.files["README.md"].decode()
    assert card.count('from_pretrained("someone/tiny"') == 2 and 'from_pretrained("tiny"' not in card
    assert (tmp_path / "model" / "README.md").read_text() == card


@pytest.mark.parametrize(
    ("wanted", "is_there"),
    [("tiny", True), ("me/tiny", True), ("someone/tiny", False), ("other", False), ("me/other", False)],
)
def test_what_is_uploaded_elsewhere_is_uploaded_again(hub, tmp_path, wanted, is_there):
    recipe = ClassificationRecipe.from_values(
        **TINY_CLASSIFIER, output_dir=str(tmp_path), push_to_hub=True, hub_model_id=wanted
    )
    recipe.write(tmp_path / "recipe.yaml")
    (tmp_path / "model").mkdir()
    write_model_card(tmp_path, "me/tiny")
    record = {"repository": "me/tiny", "url": f"{hub.url}/me/tiny", "commit": "0" * 40}
    (tmp_path / "upload.json").write_text(json.dumps(record))
    with pytest.raises(AlreadyDone) as done:
        upload_missing(RunDir(recipe), AlreadyDone("there"))
    place = "me/tiny" if is_there else "someone/tiny"  # what the hub of this test calls all that it creates
    assert str(done.value) == f"there; it is uploaded to {hub.url}/{place}" and bool(hub.files) is not is_there
    assert (tmp_path / "model" / "README.md").read_text().count(f'from_pretrained("{place}"') == 2


def test_the_keys_of_an_upload_need_push_to_hub():
    with pytest.raises(UserError, match="hub_model_id has no effect: it needs push_to_hub: true"):
        ClassificationRecipe.from_values(**TINY_CLASSIFIER, output_dir="runs/x", hub_model_id="someone/tiny")
    recipe = ClassificationRecipe.from_values(**TINY_CLASSIFIER, output_dir="runs/mine", push_to_hub=True)
    assert recipe.hub_model_id == "mine"
