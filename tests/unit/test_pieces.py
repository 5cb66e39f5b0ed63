"""Documents made piece by piece: the same as all at once, in order, from disk, without their tokens in memory."""

import json
import subprocess
import sys
import time
from itertools import count, islice

import numpy as np
import pytest
from tests.chat_tokenizers import byte_chat_tokenizer
from tests.launching import REPOSITORY, surroundings_of

from isotune.data.documents import Documents
from isotune.data.pieces import DocumentFiles, in_threads
from isotune.data.sft.preparation import SftSettings, prepare


def some_documents(seed: int, *, labelled: bool) -> Documents:
    rng = np.random.default_rng(seed)
    starts = np.concatenate([[0], np.cumsum(rng.integers(0, 9, 7))])
    ids = rng.integers(0, 500, starts[-1]).astype(np.int32)
    targets = rng.integers(0, 3, 7).astype(np.int32) if labelled else rng.random(len(ids)) < 0.5
    return Documents(ids, targets, starts, np.arange(7) + 7 * seed, {"more": rng.random(7)})


@pytest.mark.parametrize("labelled", [True, False])
def test_pieces_on_disk_are_the_documents_that_concatenation_gives(tmp_path, labelled):
    parts = [some_documents(seed, labelled=labelled) for seed in range(5)]
    made, whole = DocumentFiles(tmp_path), Documents.concat(parts)
    for part in parts:
        made.add(part)
    found = made.documents()
    assert isinstance(found.input_ids, np.memmap)
    for name, array in whole.as_arrays().items():
        assert found.as_arrays()[name].dtype == array.dtype and np.array_equal(found.as_arrays()[name], array), name
    np.testing.assert_array_equal(np.load(tmp_path / "input_ids.npy"), whole.input_ids)


def test_work_in_threads_keeps_the_order_and_reads_no_further_ahead_than_it_must():
    read = count()

    def work(item: int) -> int:
        time.sleep(0.01 if item % 3 else 0.03)
        return item * item

    found = list(islice(in_threads(((next(read), number)[1] for number in count()), work), 20))
    assert found == [(number, number * number) for number in range(20)]
    assert next(read) <= 20 + 4


def test_what_fails_in_a_thread_or_in_reading_is_raised_in_its_place():
    def broken():
        yield from (1, 2)
        raise ValueError("row 3")

    with pytest.raises(ValueError, match="row 3"):
        list(in_threads(broken(), lambda item: item))
    with pytest.raises(ZeroDivisionError):
        list(in_threads(range(3), lambda item: 1 // item))


MEMORY = """
import sys
from pathlib import Path
from tests.building import *
from transformers import AutoTokenizer
from isotune.data.classification.labels import ClassificationSettings
from isotune.data.classification.preparation import tokenize
from isotune.data.sources.source import read_rows
tokenizer = AutoTokenizer.from_pretrained(sys.argv[2])
tokenize(read_rows(sys.argv[1]), tokenizer, ClassificationSettings(), show_progress=False)
print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""


@pytest.mark.slow
def test_the_memory_of_preparation_does_not_follow_the_tokens(tmp_path, shared_data):
    rows = [{"text": f"number {number} " + "of a short text " * 10, "label": number % 2} for number in range(1_000)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    peaks = []
    for times in (20, 300):
        (tmp_path / "rows.jsonl").write_text(text * times)
        command = [sys.executable, "-c", MEMORY, tmp_path / "rows.jsonl"]
        command.append(shared_data / "tokenizers" / "bert-base-uncased")
        environment = surroundings_of({"PYTHONPATH": str(REPOSITORY), "ISOTUNE_CACHE": str(tmp_path / str(times))})
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, cwd=REPOSITORY)
        peaks.append(int(done.stdout) // 1_024)
    tokens_mib = 280_000 * 45 * 4 / 2**20  # of the rows that are more; a copy of them would already be too much
    assert peaks[1] - peaks[0] < tokens_mib, peaks


def test_a_conversation_of_many_turns_takes_time_by_its_length_and_not_by_its_square(tmp_path):
    tokenizer, seconds = byte_chat_tokenizer("chatml"), {}
    for turns in (50, 400):
        messages = [{"role": ("user", "assistant")[number % 2], "content": "word " * 100} for number in range(turns)]
        (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": messages}))
        began = time.process_time()
        found = prepare(str(tmp_path / "rows.jsonl"), "train", tokenizer, SftSettings(), show_progress=False)
        seconds[turns] = time.process_time() - began
        assert found.table.counts["asked_otherwise"] == 0
    assert seconds[400] < 40 * seconds[50], seconds  # 64 times as many were each prompt read from its start
