"""Preparation as a whole: its cache under many processes and kills, its counts, and every mistake of a user."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tests.launching import start_command
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from isotune.data.cache import cache_folder, load_or_build, write_array
from isotune.data.documents import Documents, PreparedData
from isotune.data.sft.preparation import ANSWER_CUT, NO_ANSWER, SftSettings, prepare
from isotune.io.cache_root import disk_errors_named
from isotune.io.errors import UserError

PLAIN = SftSettings()


def byte_tokenizer(*, bos: bool = True, without: str = "") -> PreTrainedTokenizerFast:
    """One token a byte: what comes out can be counted by hand."""
    special = {"pad": "<pad>", "eos": "<eos>", "bos": "<bos>"}
    vocabulary = {token: number for number, token in enumerate([*special.values(), *byte_alphabet()])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    named = {f"{role}_token": token for role, token in special.items() if role != without}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **named)


def byte_alphabet() -> list[str]:
    return sorted(pre_tokenizers.ByteLevel.alphabet())


@pytest.fixture
def talks(tmp_path) -> Path:
    """Four conversations, of which one holds no answer and one is long."""
    texts = [
        "### Human: a\n### Assistant: b",
        "### Human: a",
        "### Human: a\n### Assistant: " + "long " * 40,
        "### Human: " + "why " * 60 + "### Assistant: so",
    ]
    path = tmp_path / "talks.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def quietly(dataset_name, settings=PLAIN, tokenizer=None) -> PreparedData:
    return prepare(str(dataset_name), "train", tokenizer or byte_tokenizer(), settings, show_progress=False)


def same(one: PreparedData, other: PreparedData) -> bool:
    arrays = ("input_ids", "supervised", "starts", "source_rows")
    return (
        all(np.array_equal(getattr(one.documents, name), getattr(other.documents, name)) for name in arrays)
        and all(getattr(one.documents, name).dtype == getattr(other.documents, name).dtype for name in arrays)
        and np.array_equal(one.rows.documents, other.rows.documents)
        and np.array_equal(one.rows.starts, other.rows.starts)
        and one.table == other.table
        and one.fingerprint == other.fingerprint
    )


def entries() -> list[Path]:
    """What the cache holds beside the locks."""
    return sorted(path for path in cache_folder().glob("*") if path.suffix not in (".lock", ".holder"))


def test_a_document_is_bos_text_eos_with_the_answer_and_the_eos_supervised(talks):
    documents = quietly(talks).documents
    first = slice(0, documents.starts[1])
    text = byte_tokenizer().decode(documents.input_ids[first].tolist())
    assert text == "<bos>### Human: a\n### Assistant: b<eos>"
    supervised = documents.input_ids[first][documents.supervised[first]].tolist()
    assert byte_tokenizer().decode(supervised) == " b<eos>"
    assert documents.supervised_counts[0] == 3


def test_the_table_counts_what_can_be_counted_by_hand(talks):
    prepared = quietly(talks, SftSettings(max_seq_length=64))
    counts = prepared.table.counts
    # 1 + 29 + 1 tokens; no answer; cut at 64, of which 1 + 27 stand before the answer; cut before its answer.
    assert [counts[name] for name in ("read", "kept", "truncated", "documents")] == [4, 2, 1, 2]
    assert counts["dropped"] == {NO_ANSWER: 1, ANSWER_CUT: 1, "longer than max_seq_length": 0}
    assert prepared.documents.lengths.tolist() == [31, 64]
    assert prepared.documents.supervised_counts.tolist() == [3, 64 - 28]
    assert prepared.documents.source_rows.tolist() == [0, 2]
    assert (counts["tokens"], counts["supervised_tokens"]) == (95, 39)
    assert counts["whole_lengths"]["min"] == 31
    assert counts["whole_lengths"]["max"] == 1 + len("### Human: " + "why " * 60 + "### Assistant: so") + 1
    assert counts["rows"] == 2
    assert counts["packing_efficiency"] == 95 / 128


def test_the_printed_table_names_every_number_that_is_not_zero(talks):
    printed = str(quietly(talks, SftSettings(max_seq_length=64)).table)
    for line in (
        "documents read                              4",
        "kept                                      2",
        "truncated                                 1",
        "dropped: no assistant answer              1",
        "dropped: no answer within max_seq_length  1",
        "tokens                                      95",
        "supervised                                39 (41.1%)",
        "rows of 64 tokens                           2",
        "filled                                    74.22%",
    ):
        assert line in printed
    assert "longer than" not in printed
    assert str(talks) in printed


def test_splitting_supervises_every_answer_token_once(talks):
    whole = quietly(talks, SftSettings(max_seq_length=4_096)).documents
    split = quietly(talks, SftSettings(max_seq_length=64, overlong="split"))
    assert split.documents.supervised.sum() == whole.supervised.sum()
    assert split.documents.lengths.max() <= 64
    assert split.table.counts["split"] == 2
    assert split.table.counts["pieces_dropped"] == 265 // 63  # 265 characters stand before the last answer
    assert (split.documents.input_ids[split.documents.starts[:-1]] == 2).all(), "every piece starts with the bos"


def test_without_a_bos_no_piece_supervises_its_first_token(talks):
    documents = quietly(talks, SftSettings(max_seq_length=64, overlong="split"), byte_tokenizer(bos=False))
    documents = documents.documents
    assert documents.input_ids[0] != 2
    assert not documents.supervised[documents.starts[:-1]].any()


def test_unpacked_each_document_is_its_own_row_in_order(talks):
    rows = quietly(talks, SftSettings(packing=False)).rows
    assert rows.documents.tolist() == [0, 1, 2]
    assert rows.starts.tolist() == [0, 1, 2, 3]


def test_what_is_read_back_is_what_was_made(talks, monkeypatch, tmp_path):
    made = quietly(talks)
    (entry,) = entries()
    written = os.stat(entry / "input_ids.npy").st_mtime_ns
    again = quietly(talks)
    assert same(made, again)
    assert isinstance(again.documents.input_ids, np.memmap)
    assert os.stat(entry / "input_ids.npy").st_mtime_ns == written, "nothing was prepared twice"
    monkeypatch.setenv("ISOTUNE_CACHE", str(tmp_path / "elsewhere"))
    assert same(made, quietly(talks))


def test_each_setting_that_decides_the_documents_makes_an_entry_and_the_others_do_not(talks):
    base = quietly(talks)
    packed_otherwise = [quietly(talks, SftSettings(seed=1)), quietly(talks, SftSettings(packing=False))]
    assert len(entries()) == 1
    other_documents = [
        quietly(talks, SftSettings(max_seq_length=64)),
        quietly(talks, SftSettings(overlong="split")),
        quietly(talks, SftSettings(train_on="last")),
        quietly(talks, tokenizer=byte_tokenizer(bos=False)),
    ]
    assert len(entries()) == 5
    everything = [base, *packed_otherwise, *other_documents]
    assert len({prepared.fingerprint for prepared in everything}) == len(everything)
    talks.write_text(talks.read_text() + '{"text": "### Assistant: more"}\n')
    assert quietly(talks).table.counts["read"] == 5


@pytest.mark.parametrize(
    "damage", ["a flipped byte", "a cut file", "a lost file", "no meta.json", "an empty meta.json", "a deep one"]
)
def test_a_damaged_entry_is_noticed_and_made_anew(talks, damage):
    made = quietly(talks)
    (entry,) = entries()
    array, meta = entry / "input_ids.npy", entry / "meta.json"
    content = array.read_bytes()
    expected = made.documents.input_ids.copy()
    array.unlink()  # the arrays above stay mapped to the old file
    if damage == "a flipped byte":
        array.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "a cut file":
        array.write_bytes(content[:-8])
    elif damage != "a lost file":
        array.write_bytes(content)
        meta.write_text({"an empty meta.json": "{}", "a deep one": "[" * 100_000}.get(damage, ""))
        if damage == "no meta.json":
            meta.unlink()
    assert np.array_equal(quietly(talks).documents.input_ids, expected)
    assert array.read_bytes() == content
    assert len(entries()) == 1


PREPARE = """
import sys, time
from pathlib import Path
from transformers import PreTrainedTokenizerFast
from isotune.data.sft.preparation import SftSettings, prepare
tokenizer = PreTrainedTokenizerFast.from_pretrained(sys.argv[1])
Path(sys.argv[3]).touch()
while not Path(sys.argv[4]).exists():
    time.sleep(0.001)
prepared = prepare(sys.argv[2], "train", tokenizer, SftSettings())
print(prepared.fingerprint, prepared.documents.input_ids.sum(), len(prepared.rows), flush=True)
"""


def start(program: str, *arguments: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_four_processes_at_once_prepare_once_and_agree(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    source = tmp_path / "many.jsonl"
    rows = ({"text": f"### Human: {number}\n### Assistant: {'word ' * 60}{number}"} for number in range(3_000))
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ready, go = [tmp_path / f"ready-{number}" for number in range(4)], tmp_path / "go"
    words = [sys.executable, "-c", PREPARE, str(tmp_path / "tokenizer"), str(source)]
    processes = [start_command([*words, str(file), str(go)]) for file in ready]
    while not all(file.exists() for file in ready):
        assert all(process.poll() is None for process in processes), processes[0].communicate(timeout=1)
        time.sleep(0.01)
    go.touch()
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, outputs
    assert len({stdout for stdout, _ in outputs}) == 1
    assert sum("preparing" in stderr for _, stderr in outputs) == 1, "only who prepares shows the bar"
    assert len(entries()) == 1


BUILD = """
import sys
import numpy as np
from isotune.data.cache import load_or_build
from isotune.data.documents import Documents
def build(folder):
    tokens = int(sys.argv[1])
    ids = np.arange(tokens, dtype=np.int32)
    documents = Documents(ids, ids % 2 == 1, np.array([0, tokens]), np.array([0]))
    return documents.as_arrays(), {"tokens": tokens}
load_or_build("entry", build)
print("done", flush=True)
"""


@pytest.mark.parametrize("written", [pytest.param("input_ids.npy", marks=pytest.mark.slow), "supervised.npy"])
def test_a_preparation_killed_while_writing_leaves_nothing_that_is_picked_up(written):
    tokens = 60_000_000
    process = start(BUILD, tokens)
    deadline = time.monotonic() + 60
    while not list(cache_folder().glob(f"entry.partial-*/{written}")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.communicate()[0] == "", "killed before it was done"
    leftovers = [entry.name for entry in entries()]
    assert leftovers and all(name.startswith("entry.partial-") for name in leftovers)

    few = Documents(np.array([1, 2], np.int32), np.array([False, True]), np.array([0, 2]), np.array([0]))
    arrays, counts = load_or_build("entry", lambda _: (few.as_arrays(), {"tokens": 2}))
    assert arrays["input_ids"].tolist() == [1, 2]
    assert counts == {"tokens": 2}
    assert [entry.name for entry in entries()] == ["entry"]


def test_a_preparation_that_fails_leaves_nothing_behind(talks):
    talks.write_text(talks.read_text() + "{broken\n")
    with pytest.raises(UserError, match="line 5 is not JSON"):
        quietly(talks)
    assert entries() == []


IN_LITTLE_ROOM = """
import resource, sys
from isotune.io.errors import run_script
resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
from isotune.data.cache import load_or_build
import numpy as np
from isotune.data.documents import Documents
ids = np.arange(1000, dtype=np.int32)
documents = Documents(ids, ids > 0, np.array([0, 1000]), np.array([0]))
run_script(lambda: load_or_build("entry", lambda _: (documents.as_arrays(), {})) and None)
"""


def test_a_disk_that_takes_no_more_is_one_sentence_that_names_the_folder_and_leaves_nothing():
    process = start(IN_LITTLE_ROOM)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (2, "")
    (line,) = stderr.splitlines()
    assert str(cache_folder()) in line and "set ISOTUNE_CACHE" in line
    assert entries() == []


def test_a_full_disk_is_called_full(tmp_path):
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full, the device that is always full")
    with pytest.raises(UserError, match=f"the disk of {tmp_path} is full"), disk_errors_named(tmp_path):
        write_array(full, np.zeros(10_000))


def test_a_cache_folder_that_is_a_file_is_named(talks, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ISOTUNE_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot be written"):
        quietly(talks)


def test_a_disk_that_fails_is_named_and_a_fault_of_the_program_is_not_hidden(tmp_path):
    with (
        pytest.raises(UserError, match=f"{tmp_path} cannot be written .Input/output error"),
        disk_errors_named(tmp_path),
    ):
        raise OSError(errno.EIO, "Input/output error")
    with pytest.raises(OSError, match="Bad file"), disk_errors_named(tmp_path):
        raise OSError(errno.EBADF, "Bad file descriptor")


def refusal(tmp_path, rows, settings=PLAIN) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError) as caught:
        quietly(path, settings)
    assert entries() == [], "nothing is written"
    return str(caught.value).replace(str(path), "FILE")


GOOD = {"text": "### Assistant: a"}


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([{"summary": "a", "label": "b"}], "row 1 of FILE lacks the column 'text' or 'messages' or"),
        ([GOOD, {"text": None}], "row 2 of FILE, column 'text': holds null, neither a text nor a list of messages"),
        ([GOOD, {"text": 7}], "row 2 of FILE, column 'text': holds a number,"),
        ([GOOD, {"label": 1}], "row 2 of FILE lacks the column 'text'; it has label"),
        (
            [{"messages": [{"role": "robot", "content": "a"}]}],
            "row 1 of FILE, column 'messages': message 1 has the role",
        ),
        (
            [{"text": "### Assistant: \ud83d"}],
            "row 1 of FILE, column 'text': holds half of a surrogate pair at character 15",
        ),
        ([{"text": "plain"}] * 3, "none of the 3 rows of FILE can be trained on: 3 no assistant answer"),
    ],
)
def test_rows_that_hold_no_conversation_are_named(tmp_path, rows, sentence):
    assert refusal(tmp_path, rows).startswith(sentence)


def test_a_text_field_that_is_not_there_is_named_and_nothing_else_is_taken(tmp_path):
    settings = SftSettings(dataset_text_field="body")
    assert "lacks the column 'body'; it has text: name it by dataset_text_field" in refusal(tmp_path, [GOOD], settings)


def test_a_named_text_field_is_read(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "no", "body": "### Assistant: a"}))
    assert len(quietly(path, SftSettings(dataset_text_field="body")).documents) == 1


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (SftSettings(max_seq_length=2), "max_seq_length is 2: a document needs at least 3 tokens"),
        (SftSettings(overlong="wrap"), "overlong is 'wrap'; it may be truncate, split, drop"),
        (SftSettings(train_on="first"), "train_on is 'first'; it may be all, last, everything"),
    ],
)
def test_a_setting_that_cannot_be_is_named(tmp_path, settings, sentence):
    assert refusal(tmp_path, [GOOD], settings) == sentence


def test_a_tokenizer_without_eos_is_refused_and_one_without_pad_is_not(talks):
    with pytest.raises(UserError, match=r"has no eos token: set eos_token in its tokenizer_config\.json"):
        quietly(talks, tokenizer=byte_tokenizer(without="eos"))
    assert len(quietly(talks, tokenizer=byte_tokenizer(without="pad")).documents) == 3


def test_where_unknown_words_become_the_eos_only_the_closing_one_is_supervised(tmp_path):
    vocabulary = {word: number for number, word in enumerate(["<eos>", "<pad>", "###", "Assistant", ":", "known"])}
    backend = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<eos>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "### Assistant: known strange known"}))
    documents = quietly(path, tokenizer=tokenizer).documents
    assert documents.input_ids.tolist() == [2, 3, 4, 5, 0, 5, 0]
    assert documents.supervised.tolist() == [False, False, False, True, False, True, True]


def test_preparing_leaves_the_tokenizer_as_it_was(talks):
    tokenizer = byte_tokenizer()
    before = tokenizer("### Human: <eos>")["input_ids"]
    quietly(talks, tokenizer=tokenizer)
    assert tokenizer("### Human: <eos>")["input_ids"] == before


def test_built_in_conversations_are_prepared_from_their_messages():
    prepared = quietly("builtin:greetings")
    assert prepared.table.counts["kept"] == 80
    assert prepared.table.source == "builtin:greetings (train)"


def test_the_table_as_numbers_goes_through_json(talks):
    table = quietly(talks).table
    numbers = json.loads(json.dumps(table.as_dict()))
    assert numbers["packing_efficiency"] == table.counts["packing_efficiency"]
    assert numbers["dropped"] == table.counts["dropped"]
