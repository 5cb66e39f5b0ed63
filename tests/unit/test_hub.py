"""What is read of a Hub: whole repositories in real layouts, over HTTP, with the libraries as they are."""

import io
import json
import pickle
import socket
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save
from tests.hub_stand_in import repositories as real
from tests.hub_stand_in.client import Client
from tests.hub_stand_in.server import HubStandIn, Repository
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from isotune.config import Recipe
from isotune.data.sources import hub as hub_module
from isotune.data.sources import hub_access
from isotune.data.sources.hub import hub_record, open_repository
from isotune.data.sources.source import read_rows
from isotune.io.errors import UserError
from isotune.models.opening import load_pretrained, load_pretrained_config, load_pretrained_tokenizer
from isotune.run.hub import open_hub

TOKEN = "hf_PrivateTokenOfATest"


@pytest.fixture(scope="module")
def served() -> Iterator[HubStandIn]:
    server = HubStandIn()
    real.stock(server)
    yield server
    server.shutdown()


@pytest.fixture
def hub(served, tmp_path, monkeypatch) -> Iterator[HubStandIn]:
    """The Hub of this process, with an empty cache."""
    served.forget()
    client = Client(monkeypatch)
    client.start(served, tmp_path)
    yield served
    served.refuse_next.clear()
    monkeypatch.undo()
    client.reload()


@pytest.fixture
def again(hub, tmp_path, monkeypatch):
    """A new process with the same cache; it is given more variables."""

    def start(**more: str) -> None:
        hub.forget()
        Client(monkeypatch).start(hub, tmp_path, **more)

    return start


def files_of(hub: HubStandIn, kind: str, name: str, revision: str = "main") -> dict[str, bytes]:
    repository = hub.repositories[kind, name]
    return repository.commits[repository.refs.get(revision, revision)]


def rows_in(content: bytes) -> list[dict]:
    return pq.read_table(io.BytesIO(content)).to_pylist()


# ---- data sets in the layouts of the real ones ----


LAYOUTS = {
    (real.GUANACO, "train"): "openassistant_best_replies_train.jsonl",
    (real.GUANACO, "test"): "openassistant_best_replies_eval.jsonl",
    (real.YELP, "train"): "yelp_review_full/train-00000-of-00001.parquet",
    ("yelp_review_full", "test"): "yelp_review_full/test-00000-of-00001.parquet",
    ("imdb", "train"): "plain_text/train-00000-of-00001.parquet",
    (real.IMDB, "unsupervised"): "plain_text/unsupervised-00000-of-00001.parquet",
}


@pytest.mark.parametrize(("name", "split"), LAYOUTS)
def test_every_row_of_the_right_file_is_read_once_fetched_and_then_without_the_hub(hub, again, name, split):
    now = hub.moved.get(("dataset", name), name)
    content = files_of(hub, "dataset", now)[LAYOUTS[name, split]]
    expected = rows_in(content) if content.startswith(b"PAR1") else [*map(json.loads, content.splitlines())]
    source = read_rows(name, split)
    assert list(source.rows()) == expected
    counts = hub.downloads()
    assert set(counts) == set(files_of(hub, "dataset", now)) and set(counts.values()) == {1}
    again()
    assert read_rows(name, split).fingerprint == source.fingerprint
    assert not hub.downloads() and len(hub.requests) <= 4  # does it answer, what is the name now, and the commit
    again(HF_HUB_OFFLINE="1")
    offline = read_rows(name, split)
    assert offline.fingerprint == source.fingerprint and list(offline.rows()) == expected
    assert not hub.requests


def test_csv_from_the_hub_is_read_as_the_same_file_on_disk_is(hub, tmp_path):
    file = tmp_path / "prompts.csv"
    file.write_bytes(files_of(hub, "dataset", real.PROMPTS)["prompts.csv"])
    there, here = read_rows(real.PROMPTS), read_rows(str(file))
    assert list(there.rows()) == list(here.rows()) and there.fingerprint == here.fingerprint
    assert list(next(there.rows())) == ["act", "prompt", "for_devs", "type", "contributor"]


def test_a_format_or_a_part_that_only_the_library_reads_is_read_by_it(hub, again):
    repository = hub.add(Repository("dataset", "someone/lines"))
    repository.commit({"train.txt": b"one\ntwo\nthree\n"})
    for _ in ("fetched", "cached"):
        assert [row["text"] for row in read_rows("someone/lines").rows()] == ["one", "two", "three"]
        assert [row["label"] for row in read_rows("imdb", "test[:3]").rows()] == [0, 1, 0]
        again(HF_HUB_OFFLINE="1")
    options = "configs:\n- config_name: default\n  data_files: pairs.csv\n  sep: ';'\n"
    repository = hub.add(Repository("dataset", "someone/pairs"))
    repository.commit({"README.md": f"---\n{options}---\n".encode(), "pairs.csv": b"text;label\na,b;1\n"})
    again()
    assert list(read_rows("someone/pairs").rows()) == [{"text": "a,b", "label": 1}]


def two_configurations(hub: HubStandIn) -> Repository:
    repository = hub.add(Repository("dataset", "someone/languages"))
    configs = "".join(f"- config_name: {name}\n  data_files: {name}/*.jsonl\n" for name in ("de", "fr"))
    files = {f"{name}/train.jsonl": json.dumps({"text": name}).encode() for name in ("de", "fr")}
    repository.commit({"README.md": f"---\nconfigs:\n{configs}---\n".encode(), **files})
    return repository


def test_a_configuration_is_chosen_by_name_and_only_its_files_are_fetched(hub, again):
    two_configurations(hub)
    with pytest.raises(
        UserError, match=r"^dataset_name: 'someone/languages' has several .* by dataset_config: de, fr$"
    ):
        read_rows("someone/languages")
    with pytest.raises(UserError, match=r"has no configuration 'it'; it has de, fr$"):
        read_rows("someone/languages", config="it")
    assert list(read_rows("someone/languages", config="fr").rows()) == [{"text": "fr"}]
    assert "de/train.jsonl" not in hub.downloads()
    again(HF_HUB_OFFLINE="1")
    assert list(read_rows("someone/languages", config="fr").rows()) == [{"text": "fr"}]


def test_a_split_that_is_not_there_is_answered_with_those_that_are(hub):
    with pytest.raises(UserError, match=r"^dataset_name: .* has no split 'tset'; it has train, test, unsupervised$"):
        read_rows(real.IMDB, "tset")


def test_what_says_which_part_of_the_hub_is_refused_for_files_and_folders(tmp_path):
    with pytest.raises(UserError, match=f"^eval_dataset_revision is for Hub ids, and {tmp_path} is none$"):
        read_rows(str(tmp_path), name="eval_dataset_name", revision="main")
    with pytest.raises(UserError, match=f"^model_revision is for Hub ids, and {tmp_path} is a folder$"):
        load_pretrained_config(str(tmp_path), revision="main")


# ---- one commit ----


def numbered(hub: HubStandIn, name: str = "someone/numbers") -> Repository:
    repository = hub.add(Repository("dataset", name))
    repository.commit({"train.jsonl": b'{"text": "1"}\n'})
    return repository


def test_a_launch_reads_one_commit_whatever_is_pushed_meanwhile(hub, again):
    repository = numbered(hub)
    first = repository.refs["main"]
    assert list(read_rows("someone/numbers").rows()) == [{"text": "1"}]
    repository.commit({"train.jsonl": b'{"text": "2"}\n'})
    assert list(read_rows("someone/numbers").rows()) == [{"text": "1"}]
    again()
    assert list(read_rows("someone/numbers").rows()) == [{"text": "2"}]
    assert list(read_rows("someone/numbers", revision=first).rows()) == [{"text": "1"}]
    repository.refs["v1.0"] = first
    assert list(read_rows("someone/numbers", revision="v1.0").rows()) == [{"text": "1"}]


def test_a_run_goes_on_at_the_commits_that_it_began_with_unless_it_begins_anew(hub, again, tmp_path):
    repository = numbered(hub)
    keys = {"model_name_or_path": real.OPT, "dataset_name": "someone/numbers", "output_dir": str(tmp_path / "run")}
    recipe = Recipe.from_values(**keys)
    open_hub(recipe)
    read_rows("someone/numbers")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "environment.json").write_text(json.dumps({"hub": hub_record()}))
    repository.commit({"train.jsonl": b'{"text": "2"}\n'})
    again()
    opened = open_hub(recipe)
    assert list(read_rows("someone/numbers").rows()) == [{"text": "1"}]
    again()
    opened.adopt()  # as another rank does
    hub.forget()
    assert list(read_rows("someone/numbers").rows()) == [{"text": "1"}] and not hub.requests
    again()
    open_hub(recipe.with_values(dataset_revision="main"))
    assert list(read_rows("someone/numbers", revision="main").rows()) == [{"text": "1"}]
    again()
    open_hub(recipe.with_values(resume="never"))
    assert list(read_rows("someone/numbers").rows()) == [{"text": "2"}]


def test_a_run_that_goes_on_from_anothers_checkpoint_keeps_the_commits_of_that_one(hub, again, tmp_path):
    repository = numbered(hub)
    keys = {"model_name_or_path": real.OPT, "dataset_name": "someone/numbers"}
    for folder, text in (("first", b'{"text": "1"}\n'), ("other", b'{"text": "2"}\n')):
        repository.commit({"train.jsonl": text})
        again()
        open_hub(Recipe.from_values(**keys, output_dir=str(tmp_path / folder), resume="never"))
        assert list(read_rows("someone/numbers").rows()) == [json.loads(text)]
        (tmp_path / folder / "checkpoints" / "step-00000002").mkdir(parents=True)
        (tmp_path / folder / "environment.json").write_text(json.dumps({"hub": hub_record()}))
    repository.commit({"train.jsonl": b'{"text": "3"}\n'})
    for output in ("third", "other"):  # whatever a run of its own has recorded
        again()
        checkpoint = tmp_path / "first" / "checkpoints" / "step-00000002"
        open_hub(Recipe.from_values(**keys, output_dir=str(tmp_path / output), resume=str(checkpoint)))
        assert list(read_rows("someone/numbers").rows()) == [{"text": "1"}]


def test_what_was_read_is_on_record_with_its_commit_and_digests(hub):
    import hashlib

    read_rows("imdb", "test")
    load_pretrained_config(real.OPT)
    data, model = hub_record()
    assert data["repository"] == real.IMDB and data["commit"] == hub.repositories["dataset", real.IMDB].refs["main"]
    files = files_of(hub, "dataset", real.IMDB)
    test = "plain_text/test-00000-of-00001.parquet"
    assert data["files"] == {test: hashlib.sha256(files[test]).hexdigest()}
    files = files_of(hub, "model", real.OPT)
    assert model["kind"] == "model" and model["revision"] == "main"
    assert model["files"]["config.json"] == hashlib.sha256(files["config.json"]).hexdigest()
    assert "pytorch_model.bin" not in model["files"]  # no weights were asked for


def test_a_cached_file_that_is_not_what_the_hub_named_is_refused(hub):
    read_rows(real.YELP)
    repository = open_repository("dataset", real.YELP)
    blob = (repository.folder / LAYOUTS[real.YELP, "train"]).resolve()
    blob.write_bytes(b"?" + blob.read_bytes()[1:])
    with pytest.raises(UserError, match=f"the cached copy of .*train.* is damaged: remove {blob}"):
        hub_record()


# ---- models ----


def test_opts_pickle_in_half_precision_is_read_to_the_bit_and_no_conversion_of_it(hub, again, capsys):
    stored = torch.load(io.BytesIO(files_of(hub, "model", real.OPT)["pytorch_model.bin"]), weights_only=True)
    for more in ({}, {"HF_HUB_OFFLINE": "1"}):
        again(**more)
        model = load_pretrained(real.OPT, auto=AutoModelForCausalLM, dtype=torch.float32)
        loaded = model.state_dict()
        assert {f"model.{name}" for name in stored} | {"lm_head.weight"} == set(loaded)
        assert all(torch.equal(loaded[f"model.{name}"], tensor.float()) for name, tensor in stored.items())
        assert torch.equal(loaded["lm_head.weight"], stored["decoder.embed_tokens.weight"].float())
        assert model.generation_config.eos_token_id == 2
        assert not any(word in r.path for r in hub.requests for word in ("refs/pr", "discussions", "commits"))
        assert not hub.downloads().keys() - files_of(hub, "model", real.OPT).keys() - {"tf_model.h5"}
    (note,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note ")]
    assert note.startswith(f"note        the weights of {real.OPT} are a pickle (pytorch_model.bin)")


class Harmful:
    def __reduce__(self):
        return print, ("code from a file",)


@pytest.mark.parametrize("place", ["hub", "folder"])
def test_a_pickle_that_calls_code_is_one_sentence_and_nothing_is_run(hub, tmp_path, capsys, place):
    files = files_of(hub, "model", real.OPT)
    harmful = {"config.json": files["config.json"], "pytorch_model.bin": real.pickled({"a": Harmful()})}
    name = "someone/harmful"
    hub.add(Repository("model", name)).commit(harmful)
    if place == "folder":
        name = str(tmp_path)
        for file, content in harmful.items():
            (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=r"their pickle calls print, and code in a file is never run$"):
        load_pretrained(name, auto=AutoModelForCausalLM)
    assert "code from a file" not in capsys.readouterr().out
    with pytest.raises(pickle.UnpicklingError):  # what it is that became a sentence
        torch.load(io.BytesIO(harmful["pytorch_model.bin"]), weights_only=True)


def test_shards_are_fetched_and_nothing_that_is_not_read(hub):
    stored = torch.load(io.BytesIO(files_of(hub, "model", real.OPT)["pytorch_model.bin"]), weights_only=True)
    names = sorted(stored)
    shards = {f"model-0000{n + 1}-of-00002.safetensors": names[n::2] for n in range(2)}
    index = {"metadata": {}, "weight_map": {name: shard for shard, own in shards.items() for name in own}}
    files = {shard: save({name: stored[name].contiguous() for name in own}) for shard, own in shards.items()}
    others = {"pytorch_model.bin": b"not this", "model.fp16.safetensors": b"nor this", "onnx/model.onnx": b"nor this"}
    files |= {"config.json": files_of(hub, "model", real.OPT)["config.json"]}
    files["model.safetensors.index.json"] = json.dumps(index).encode()
    hub.add(Repository("model", "someone/shards")).commit(files | others | {"training_args.bin": b"nor this"})
    model = load_pretrained("someone/shards", auto=AutoModelForCausalLM, dtype=torch.float32)
    assert all(torch.equal(model.state_dict()[f"model.{n}"], tensor.float()) for n, tensor in stored.items())
    assert set(hub.downloads()) == set(files)


def test_berts_old_names_of_weights_are_known_and_its_old_head_is_left_out(hub):
    model = load_pretrained("bert-base-uncased", auto=AutoModelForSequenceClassification, may_lack=["classifier"])
    stored = torch.load(io.BytesIO(files_of(hub, "model", real.BERT_UNCASED)["pytorch_model.bin"]), weights_only=True)
    gamma = stored["bert.encoder.layer.1.output.LayerNorm.gamma"]
    assert torch.equal(model.bert.encoder.layer[1].output.LayerNorm.weight, gamma)
    assert set(hub.downloads()) == {"config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt",
                                    "model.safetensors"}  # fmt: skip
    assert model.config.name_or_path == real.BERT_UNCASED


def test_opts_tokenizer_of_two_files_gives_the_ids_of_the_whole_one(hub, shared_data):
    whole = json.loads((shared_data / "tokenizers" / "opt" / "tokenizer.json").read_text())["model"]
    files = {**files_of(hub, "model", real.OPT), **real.opt_tokenizer_files(whole["vocab"], whole["merges"])}
    hub.add(Repository("model", "someone/words")).commit(files)
    ours = load_pretrained_tokenizer("someone/words", use_fast=True)
    expected = AutoTokenizer.from_pretrained(shared_data / "tokenizers" / "opt")
    text = "### Human: Wie geht's?  \n### Assistant: Fine, </s> thanks \u2014 \U0001f642"
    assert ours(text)["input_ids"] == expected(text)["input_ids"]
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (2, 2, 1)


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({"adapter_config.json": b"{}", "adapter_model.safetensors": b""}, "is an adapter, not a whole model"),
        ({"config.json": b"{}", "adapter_config.json": b"{}"}, "is an adapter, not a whole model"),
        (
            {"config.json": b"{}", "adapter_config.json": b"{}", "model-00001-of-00002.safetensors": b""},
            "is a model with an adapter in it: merge the two, or move one away",
        ),
        ({"model.gguf": b""}, "has no config.json: it has model.gguf"),
        ({"config.json": b"{}", "tf_model.h5": b""}, "has neither model.safetensors nor pytorch_model.bin"),
    ],
)
def test_a_repository_without_a_model_that_can_be_read_is_answered_with_what_it_has(hub, files, sentence):
    hub.add(Repository("model", "someone/other")).commit(files)
    with pytest.raises(UserError, match=f"^the model 'someone/other' {sentence}"):
        load_pretrained("someone/other", auto=AutoModelForCausalLM)


# ---- a Hub that refuses, waits or breaks off ----


def test_gated_repositories_say_whom_to_ask_and_open_with_an_accepted_token(hub, again):
    secret = hub.add(Repository("model", "someone/gated", gated=True))
    secret.commit(files_of(hub, "model", real.OPT))
    data = hub.add(Repository("dataset", "someone/gated-rows", gated=True))
    data.commit({"README.md": b"A card.\n", "train.jsonl": b'{"text": "1"}\n'})
    ask = f"is gated: ask its owners for access at {hub.url}"
    with pytest.raises(UserError, match=f"^the model 'someone/gated' {ask}/someone/gated, then log in with `hf auth"):
        load_pretrained_config("someone/gated")
    with pytest.raises(UserError, match=f"^dataset_name: the data set 'someone/gated-rows' {ask}/datasets/someone/gat"):
        read_rows("someone/gated-rows")
    again(HF_TOKEN=TOKEN)
    with pytest.raises(UserError, match=f"^the model 'someone/gated' {ask}/someone/gated$"):
        load_pretrained_config("someone/gated")
    hub.accepted.add(TOKEN)
    again(HF_TOKEN=TOKEN)
    assert load_pretrained_config("someone/gated").model_type == "opt"
    assert list(read_rows("someone/gated-rows").rows()) == [{"text": "1"}]


def test_a_token_goes_to_the_hub_alone_and_is_neither_shown_nor_on_record(hub, again, capfd):
    again(HF_TOKEN=TOKEN)
    load_pretrained(real.OPT, auto=AutoModelForCausalLM)
    with pytest.raises(UserError) as refused:
        load_pretrained_config("someone/absent")
    tokens = {host: {r.token for r in hub.requests if r.host == host and r.path != "/"}
              for host in ("127.0.0.1", "localhost")}  # fmt: skip
    assert f"Bearer {TOKEN}" in tokens["127.0.0.1"] and tokens["localhost"] == {None}
    assert TOKEN not in str(refused.value) + json.dumps(hub_record()) + "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("load", "sentence"),
    [
        (
            lambda: load_pretrained_config("someone/absent"),
            "the Hub has no model 'someone/absent' that this user may",
        ),
        (
            lambda: read_rows("someone/absent"),
            "dataset_name: the Hub has no data set 'someone/absent' that this",
        ),
        (lambda: read_rows("absent"), "dataset_name: the Hub has no data set 'absent' that this user may read"),
        (lambda: load_pretrained_config(real.OPT, revision="v9"), f"the model '{real.OPT}' has no revision 'v9'"),
        (lambda: read_rows(real.IMDB, revision="v9"), f"dataset_name: the data set '{real.IMDB}' has no revision 'v9'"),
    ],
)
def test_what_is_not_there_is_one_sentence(hub, load, sentence):
    with pytest.raises(UserError) as said:
        load()
    assert str(said.value).startswith(sentence) and "\n" not in str(said.value)


def test_the_pause_that_the_hub_asks_for_is_made(hub, monkeypatch, capsys):
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    hub.refuse_next += [(429, {"Retry-After": "7"}), (429, {"ratelimit": '"api";r=0;t=20'})]
    assert len(list(read_rows(real.GUANACO, "test").rows())) == 8
    assert pauses == [7, 21]
    assert "note        the Hugging Face Hub asks to wait 7 s (429, too many requests)" in capsys.readouterr().err
    hub.refuse_next += [(429, {"Retry-After": "1"})] * hub_access.TRIES
    with pytest.raises(UserError, match=f"the model '{real.OPT}' cannot be fetched: the Hub answers 429, it has"):
        load_pretrained_config(real.OPT)


@pytest.mark.parametrize("ignores_ranges", [False, True])
def test_a_download_that_breaks_off_goes_on_where_it_was(hub, monkeypatch, ignores_ranges):
    monkeypatch.setattr(time, "sleep", lambda _: None)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100)  # what arrives less than a chunk is asked for again
    hub.ignores_ranges = ignores_ranges
    file, cut = LAYOUTS[real.YELP, "train"], 1000
    content = files_of(hub, "dataset", real.YELP)[file]
    hub.cut_next[file] = cut
    source = read_rows(real.YELP)
    hub.ignores_ranges = False
    assert list(source.rows()) == rows_in(content)
    first, second = [r for r in hub.requests if r.method == "GET" and r.path.endswith(file)]
    assert (first.sent, first.range) == (cut, None)
    assert second.range == f"bytes={cut}-"
    assert second.sent == (len(content) if ignores_ranges else len(content) - cut)


def test_a_hub_that_is_down_is_said_at_once_and_what_is_cached_is_read(hub, again, monkeypatch, capsys):
    load_pretrained_config(real.OPT)
    expected = list(read_rows(real.GUANACO).rows())
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        again(HF_ENDPOINT=endpoint)
        started = time.monotonic()
        assert list(read_rows(real.GUANACO).rows()) == expected
        assert load_pretrained_config(real.OPT).model_type == "opt"
        assert "the Hugging Face Hub is out of reach: " + real.GUANACO in capsys.readouterr().err
        again(HF_ENDPOINT=endpoint)
        with pytest.raises(UserError, match=f"^dataset_name: the data set '{real.YELP}' is on the .* out of reach: "):
            read_rows(real.YELP)
        assert time.monotonic() - started < 10, "no retries"


def test_processes_that_begin_together_fetch_a_file_once(hub):
    repositories = [open_repository("dataset", real.GUANACO)]
    threads = [threading.Thread(target=lambda: read_rows(real.GUANACO)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(hub.downloads().values()) == {1} and len(repositories) == 1


def test_a_part_of_the_shards_that_was_downloaded_by_hand_is_refused_offline(hub, again):
    from huggingface_hub import snapshot_download

    shards = {f"data/train-{number:05d}-of-00002.jsonl": b'{"text": "a"}\n' for number in range(2)}
    hub.add(Repository("dataset", "lab/shards")).commit(shards)
    snapshot_download("lab/shards", repo_type="dataset", allow_patterns="*-00001-of-*")
    again(HF_HUB_OFFLINE="1")
    with pytest.raises(UserError, match=r"^dataset_name: 'lab/shards' lacks 1 of the 2 shards of 'train', first"):
        read_rows("lab/shards")


def test_what_was_downloaded_by_hand_is_read_offline(hub, again):
    from huggingface_hub import snapshot_download

    snapshot_download(real.YELP, repo_type="dataset")
    snapshot_download(real.OPT)
    again(HF_HUB_OFFLINE="1")
    assert len(list(read_rows(real.YELP, "test").rows())) == 20
    load_pretrained(real.OPT, auto=AutoModelForCausalLM)
    load_pretrained_tokenizer(real.OPT)
    assert not hub.requests
    with pytest.raises(UserError, match=f"^dataset_name: the data set '{real.IMDB}' is not in the local cache and HF_"):
        read_rows(real.IMDB)


@pytest.mark.parametrize("content", ["[" * 100_000, "[1]", '{"now": 5, "files": 5}', '{"now": "../x"}', ""])
def test_notes_about_a_repository_that_are_none_are_passed_over(tmp_path, monkeypatch, content):
    (tmp_path / "note.json").write_text(content)
    monkeypatch.setattr(hub_module, "_moved_file", lambda kind, name: tmp_path / "note.json")
    assert hub_module._moved("dataset", "a/b") == "a/b"
    assert hub_module._remembered(tmp_path / "note.json", SimpleNamespace(folder=tmp_path)) is None
