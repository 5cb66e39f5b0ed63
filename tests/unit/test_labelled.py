"""Labelled texts: their tokens beside the stock tokenizer's, what is cut and counted, and every mistake of a user."""

import json

import numpy as np
import pytest
from tests.launching import TINY_CLASSIFIER
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, PreTrainedTokenizerFast

from isotune.config import ClassificationRecipe
from isotune.data.batch_schedule import StepSchedule, collate
from isotune.data.classification.labels import ClassificationSettings
from isotune.data.classification.preparation import tokenize
from isotune.data.documents import PreparedData
from isotune.data.sources.source import read_rows
from isotune.data.tokenizer import TextEncoder
from isotune.io.errors import UserError
from isotune.models.opening import load_tokenizer

WORDS = [str(number) for number in range(1, 40)]
TEN = " ".join(WORDS[:10])


def word_tokenizer(*, special: bool = True) -> PreTrainedTokenizerFast:
    """A word is a token, and `[C] ... [S]` stands around a text: what comes out can be counted by hand."""
    vocabulary = {token: number for number, token in enumerate(["[P]", *WORDS, "[C]", "[S]", "?"])}
    backend = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if special:
        marks = [("[C]", vocabulary["[C]"]), ("[S]", vocabulary["[S]"])]
        backend.post_processor = processors.TemplateProcessing(single="[C] $A [S]", special_tokens=marks)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[P]", cls_token="[C]", sep_token="[S]", unk_token="?"
    )


@pytest.fixture
def write(tmp_path):
    def written(*rows: dict, name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return written


def rows(*pairs: tuple[str, object]) -> list[dict]:
    return [{"text": text, "label": label} for text, label in pairs]


def quietly(path: str, tokenizer=None, *, evaluation: bool = False, **settings) -> PreparedData:
    source = read_rows(path, "train")
    labelled = tokenize(source, tokenizer or word_tokenizer(), ClassificationSettings(**settings), show_progress=False)
    labelled.check_classes(evaluation=evaluation)
    return labelled.prepared()


def words_of(prepared: PreparedData, number: int) -> list[int]:
    documents = prepared.documents
    return documents.input_ids[documents.starts[number] : documents.starts[number + 1]].tolist()


@pytest.mark.parametrize(
    ("overlong", "kept"),
    [("head", [1, 2, 3, 4, 5, 6]), ("tail", [5, 6, 7, 8, 9, 10]), ("head_tail", [1, 6, 7, 8, 9, 10])],
)
def test_a_text_that_is_too_long_keeps_the_end_that_was_asked_for(write, overlong, kept):
    prepared = quietly(write(*rows((TEN, 1), ("1 2", 0))), overlong=overlong, max_seq_length=8)
    assert words_of(prepared, 0) == [40, *kept, 41]
    assert words_of(prepared, 1) == [40, 1, 2, 41]
    assert prepared.table.counts["cut"] == 1 and prepared.table.counts["whole_lengths"]["max"] == 12
    assert f"cut to 8 tokens ({overlong})" in str(prepared.table)


def test_an_empty_text_is_kept_as_the_special_tokens_alone_and_counted(write):
    prepared = quietly(write(*rows(("", 1), ("1", 0), ("  ", 0))))
    assert [words_of(prepared, n) for n in range(3)] == [[40, 41], [40, 1, 41], [40, 41]]
    assert prepared.table.counts["empty"] == 2 and "of an empty text, kept" in str(prepared.table)


def test_the_table_shows_the_balance_of_the_classes(write):
    prepared = quietly(write(*rows(("1", 0), ("2", 1), ("3", 1), ("4", 1))))
    assert prepared.table.counts["classes"] == [1, 3] and prepared.num_labels == 2
    assert "of class 0" in str(prepared.table) and "3 (75.0%)" in str(prepared.table)


def test_a_special_token_written_out_in_a_text_is_text(write, shared_data):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(shared_data / "tokenizers" / "bert-base-cased"))
    tokens = words_of(quietly(write(*rows(("one [SEP] two", 0), ("1", 1))), tokenizer), 0)
    assert tokens.index(tokenizer.sep_token_id) == len(tokens) - 1 and len(tokens) > 5


def test_real_texts_have_the_tokens_of_the_stock_tokenizer(shared_data):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(shared_data / "tokenizers" / "bert-base-cased"))
    source = shared_data / "imdb" / "test.jsonl"
    prepared = quietly(str(source), tokenizer, max_seq_length=128)
    lines = [json.loads(line) for line in source.open(encoding="utf-8")]
    assert prepared.documents.labels.tolist() == [line["label"] for line in lines]
    for number, line in enumerate(lines[:300]):
        expected = tokenizer(line["text"], truncation=True, max_length=128)["input_ids"]
        assert words_of(prepared, number) == expected


def test_the_second_preparation_reads_the_cache_and_gives_the_same(write, monkeypatch):
    path = write(*rows(("1", 0), ("2 3", 1)))
    first = quietly(path)
    monkeypatch.setattr(
        "isotune.data.classification.preparation.read_documents", lambda *_, **__: pytest.fail("built again")
    )
    again = quietly(path)
    assert again.fingerprint == first.fingerprint
    assert np.array_equal(again.documents.input_ids, first.documents.input_ids)
    assert np.array_equal(again.documents.labels, first.documents.labels)


def test_a_step_is_documents_and_its_passes_hold_each_once_with_its_label(write):
    texts = [" ".join(WORDS[: 1 + n % 7]) for n in range(23)]
    prepared = quietly(write(*rows(*((text, n % 3) for n, text in enumerate(texts)))))
    plan = StepSchedule(prepared.documents, prepared.rows, global_batch_size=5, microbatch_tokens=18, seed=3)
    seen: list[int] = []
    assert plan.steps_per_epoch == 5
    for number in range(5):
        step = plan.step(number)
        assert step.supervised_tokens == step.documents == (5 if number < 4 else 3)
        for microbatch in step.microbatches:
            inputs = collate(prepared.documents, microbatch.documents)
            assert inputs["input_ids"].shape[1] <= 18
            assert inputs["targets"].tolist() == [n % 3 for n in microbatch.documents]
            starts = inputs["cu_seq_lens_q"][:-1].long()
            assert (inputs["input_ids"][0, starts] == 40).all()
            seen += microbatch.documents
    assert sorted(seen) == list(range(23))


def test_the_builtin_corpus_has_three_balanced_classes_and_no_row_of_test_in_train():
    train, test = (list(read_rows("builtin:opinions", split).rows()) for split in ("train", "test"))
    assert [sum(row["label"] == k for row in train) for k in range(3)] == [200, 200, 200]
    assert not {row["text"] for row in train} & {row["text"] for row in test}


MISTAKES = {
    "a label below 0": (rows(("1", 0), ("2", -1)), {}, "row 2 of .*holds -1: a class is a whole number from 0"),
    "a label that is a word": (rows(("1", "good"), ("2", 1)), {}, "row 1 of .*holds 'good'.* row 2 .* 1: a class"),
    "a label that is null": (rows(("1", 0), ("2", None)), {}, "row 2 of .*holds null"),
    "a label that is a fraction": (rows(("1", 0.5), ("2", 1)), {}, "row 1 of .*holds 0.5"),
    "a text that is null": (rows(("1", 0), (None, 1)), {}, "row 2 of .*, column 'text', holds null, not a text"),
    "a label beyond num_labels": (
        rows(("1", 0), ("2", 1), ("3", 2)), {"num_labels": 2}, "row 3 of .*is of class 2, and num_labels is 2: 0 to 1",
    ),
    "fewer classes than num_labels": (
        rows(("1", 0), ("2", 1)), {"num_labels": 3}, "has no row of class 2, and num_labels is 3",
    ),
    "a class without rows": (rows(("1", 0), ("2", 2)), {}, "has no row of class 1, and the largest class is 2"),
    "one class only": (rows(("1", 1), ("2", 1)), {}, "every row of .* is of class 1: there is nothing to tell apart"),
    "no text": ([{"review": "1", "label": 0}], {}, "row 1 of .*lacks the column 'text'; it has review, label"),
    "no label": (
        [{"text": "1", "label": 0}, {"text": "1"}], {}, "row 2 of .*lacks the column 'label'.* by dataset_label_field",
    ),
    "no room": (rows(("1", 0), ("2", 1)), {"max_seq_length": 2}, "max_seq_length is 2: a document needs at least 3"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_data_is_one_sentence_that_names_the_row(write, mistake):
    data, settings, sentence = MISTAKES[mistake]
    with pytest.raises(UserError, match=sentence) as said:
        quietly(write(*data), **settings)
    assert "\n" not in str(said.value)


def test_an_evaluation_split_may_lack_a_class_but_not_have_a_new_one(write):
    assert quietly(write(*rows(("1", 0))), num_labels=2, evaluation=True).table.counts["classes"] == [1, 0]
    with pytest.raises(UserError, match=r"row 1 of .*is of class 2, and num_labels is 2"):
        quietly(write(*rows(("1", 2)), name="new.jsonl"), num_labels=2, evaluation=True)


def test_a_documents_id_is_the_data_sets_own_where_it_has_one(write):
    named = [{"id": f"review-{n}", "text": str(n), "label": n % 2} for n in (3, 1, 2)]
    assert quietly(write(*named)).documents.ids.tolist() == ["review-3", "review-1", "review-2"]
    numbered = [{**row, "id": 10**15 + n, "key": n} for n, row in enumerate(named)]
    assert quietly(write(*numbered)).documents.ids.tolist() == [10**15, 10**15 + 1, 10**15 + 2]
    assert quietly(write(*numbered), dataset_id_field="key").documents.ids.tolist() == [0, 1, 2]
    assert quietly(write(*rows(("1", 0), ("2", 1)))).documents.ids.tolist() == [0, 1]


def test_texts_are_cleaned_where_the_recipe_says_so_and_counted_where_not(write):
    path = write(*rows((r"1\n2 <br />3", 0), ("1 2 3", 1), ("4", 0)))
    left, undone = quietly(path), quietly(path, clean_text=True)
    assert words_of(left, 0) != words_of(left, 1) and words_of(undone, 0) == words_of(undone, 1) == [40, 1, 2, 3, 41]
    assert left.table.counts["marked"] == undone.table.counts["marked"] == 1
    assert "HTML or escapes, left (clean_text" in str(left.table) and "escapes, undone" in str(undone.table)
    assert list(undone.texts()) == [r"1\n2 <br />3", "1 2 3", "4"]  # as the source has them
    assert left.fingerprint != undone.fingerprint


def test_a_broken_row_of_a_csv_is_named(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text,label\none,0\ntwo,1,surplus\n")
    with pytest.raises(UserError, match=r"rows\.csv line 3 \(row 2\) has 3 cells, and line 1 names 2 columns: 'two"):
        quietly(str(path))


def test_a_tokenizer_without_a_token_around_the_text_gives_the_tokens_of_the_text_alone(write):
    documents = quietly(write(*rows(("1 2", 0), ("3", 1))), word_tokenizer(special=False)).documents
    assert documents.input_ids.tolist() == word_tokenizer(special=False).convert_tokens_to_ids(["1", "2", "3"])
    assert documents.lengths.tolist() == [2, 1]


def test_a_folder_without_a_tokenizers_files_is_refused(tmp_path):
    AutoConfig.for_model("roberta").save_pretrained(tmp_path / "roberta")
    values = TINY_CLASSIFIER | {"model_name_or_path": str(tmp_path / "roberta"), "output_dir": str(tmp_path / "run")}
    with pytest.raises(UserError, match=r"roberta' encodes a letter to no token: is its tokenizer\.json there"):
        load_tokenizer(ClassificationRecipe.from_values(**values), needed=("pad",))


def test_a_text_of_two_megabytes_is_tokenised_once_and_its_length_is_known():
    encoder, handed = TextEncoder(word_tokenizer()), list[int]()  # characters of each call
    inner = encoder.backend

    class Counted:
        def encode_batch_fast(self, texts, **how):
            handed.append(sum(map(len, texts)))
            return inner.encode_batch_fast(texts, **how)

    encoder.backend = Counted()
    text = "calm storm " * 182_000
    documents = encoder.encode([text], 16, "head_tail")
    assert handed == [len(text)] and len(text) > 2_000_000
    assert documents.columns["whole_lengths"].tolist() == [2 * 182_000 + encoder.special_tokens]
    assert documents.lengths.tolist() == [16]
