"""Rows that are left out are counted, told where they are many, and refused where they are most."""

import json

import pytest

from isotune.config import Recipe
from isotune.data.documents import check_left_out
from isotune.data.sft.preparation import prepare_conversations
from isotune.evaluation.tasks import GenerationTask
from isotune.io.errors import UserError
from isotune.models.opening import load_tokenizer

ANSWERED, BARE = "### Human: a?\n### Assistant: b", "### Human: only a question"
UNASKED = "### Assistant: an answer to nothing"


def write(folder, texts) -> str:
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(folder / "rows.jsonl")


@pytest.mark.parametrize(
    ("left", "warns", "refuses"), [(5, False, False), (6, True, False), (50, True, False), (51, True, True)]
)
def test_a_share_above_a_twentieth_is_told_and_above_a_half_refused(capsys, left, warns, refuses):
    counts = {"too long": left - 1, "without an answer": 1, "never": 0}
    if refuses:
        with pytest.raises(UserError, match=r"51 of the 100 rows of X are left out \(50 too long, 1 without an"):
            check_left_out("X", 100, counts, allowed=False, show=True)
    check_left_out("X", 100, counts, allowed=refuses, show=True)
    assert ("warning     " in capsys.readouterr().out) is warns
    check_left_out("X", 100, counts, allowed=refuses, show=False)
    assert not capsys.readouterr().out


def test_training_data_of_which_most_is_left_out_need_a_word(tmp_path, monkeypatch):
    monkeypatch.setenv("ISOTUNE_CACHE", str(tmp_path / "cache"))
    name = write(tmp_path, [ANSWERED, BARE, BARE])
    recipe = Recipe.from_values(
        model_name_or_path="builtin:opt-tiny", tune="full", dataset_name=name, output_dir=str(tmp_path / "run")
    )
    tokenizer = load_tokenizer(recipe)
    for _ in range(2):  # counted anew, and as they lie in the cache
        with pytest.raises(UserError, match=r"2 of the 3 rows of .*rows\.jsonl are left out \(2 no assistant answer\)"):
            prepare_conversations(recipe, tokenizer, show=False)
    data = prepare_conversations(recipe.with_values(allow_dropped=True), tokenizer, show=False)
    assert (data.train.table.counts["read"], data.train.table.counts["kept"]) == (3, 1)


def test_an_evaluation_counts_the_rows_that_it_read_and_left_out(tmp_path):
    name = write(tmp_path, [ANSWERED, BARE, UNASKED, ANSWERED, ANSWERED, BARE])
    task = GenerationTask(dataset_name=name)
    samples = task.samples()
    assert [sample.id for sample in samples] == [0, 3, 4]
    assert (samples.rows_read, samples.left_out) == (
        6, {"without an answer": 2, "without a question before an answer": 1},
    )  # fmt: skip
    first = task.samples(1)
    assert (len(first), first.rows_read, first.left_out) == (1, 1, {})
    name = write(tmp_path, [ANSWERED, BARE, UNASKED])
    with pytest.raises(UserError, match="2 of the 3 rows"):
        GenerationTask(dataset_name=name).samples()
    assert len(GenerationTask(dataset_name=name, allow_dropped=True).samples()) == 1
