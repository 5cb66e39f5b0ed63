"""Pairs of texts: the tokenizer's own tokens, types and cuts, found columns, and what is the same pair."""

import json

import numpy as np
import pytest
from tests.label_sets import pair_tokenizer
from tests.unit.test_labelled import word_tokenizer
from tokenizers import processors

from isotune.config import ClassificationRecipe
from isotune.data.batch_schedule import collate
from isotune.data.classification.split import prepare_labelled
from isotune.data.datasets import documents_of
from isotune.data.documents import FIRST_TYPE
from isotune.data.tokenizer import TextEncoder
from isotune.io.errors import UserError

LONG = "the old man said that we saw it again today and then the sea came in with the rain"
PAIRS = [(LONG, "short"), ("short", LONG), (LONG, LONG + " twice"), ("", "one"), ("two", ""), ("a", "b"), (LONG, LONG)]


@pytest.mark.parametrize("kind", ["bert", "roberta"])
@pytest.mark.parametrize("room", [12, 13, 200])
def test_tokens_types_and_cuts_are_the_tokenizers_own(kind, room):
    tokenizer = pair_tokenizer(kind)
    firsts, seconds = zip(*PAIRS, strict=True)
    documents = TextEncoder(tokenizer).encode_pairs(firsts, seconds, room, "head")
    own = tokenizer(list(firsts), list(seconds), truncation="longest_first", max_length=room)
    rows = tuple(range(len(PAIRS)))
    inputs = collate(documents, rows)
    assert inputs["input_ids"][0].tolist() == [token for ids in own["input_ids"] for token in ids]
    assert documents.lengths.tolist() == list(map(len, own["input_ids"]))
    assert ("token_type_ids" in inputs) == (kind == "bert") == ("token_type_ids" in own)
    if kind == "bert":
        assert inputs["token_type_ids"][0].tolist() == [one for types in own["token_type_ids"] for one in types]
    whole = tokenizer(list(firsts), list(seconds))
    assert documents.columns["whole_lengths"].tolist() == list(map(len, whole["input_ids"]))


def test_overlong_says_which_end_of_each_text_is_kept():
    tokenizer = pair_tokenizer("bert")
    encoder = TextEncoder(tokenizer)
    one, two = (encoder.tokens([text])[0].tolist() for text in (LONG, LONG + " twice"))
    for overlong, kept in (("tail", (one[-4:], two[-5:])), ("head_tail", (one[:1] + one[-3:], two[:1] + two[-4:]))):
        documents = encoder.encode_pairs([LONG], [LONG + " twice"], 12, overlong)
        assert documents.input_ids.tolist() == [0, *kept[0], 2, *kept[1], 2]


def test_a_tokenizer_without_a_form_for_two_texts_is_refused():
    with pytest.raises(UserError, match="has no form for two texts"):
        TextEncoder(word_tokenizer()).encode_pairs(["a"], ["b"], 8, "head")
    odd = pair_tokenizer("bert")
    odd.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s>:1 $A:1 </s>:1 $B:0 </s>:0", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    with pytest.raises(UserError, match="only 0 for the first and 1 for the second are known here"):
        TextEncoder(odd).encode_pairs(["a"], ["b"], 8, "head")


@pytest.fixture
def prepare(tmp_path):
    def prepared(rows, **keys):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        keys = {"model_name_or_path": "x", "output_dir": str(tmp_path / "run"), "max_seq_length": 32, **keys}
        recipe = ClassificationRecipe.from_values(dataset_name=str(tmp_path / "rows.jsonl"), **keys)
        return prepare_labelled(recipe, pair_tokenizer("bert"), show=False)

    return prepared


def rows_with(one: str, two: str, **more) -> list[dict]:
    return [{one: f"first text {n}", two: f"second text {n}", "label": n % 2, **more} for n in range(6)]


@pytest.mark.parametrize("names", [("premise", "hypothesis"), ("question1", "question2"), ("Sentence1", "Sentence2"),
                                   ("question", "sentence"), ("text", "text_pair")])  # fmt: skip
def test_known_pairs_of_columns_are_found_said_and_recorded(prepare, names):
    data = prepare(rows_with(*names, idx=7))
    assert data.found == {"dataset_text_field": names[0], "dataset_text_pair_field": names[1]}
    assert FIRST_TYPE in data.train.documents.columns
    assert f"the second texts from the column {names[1]!r}" in str(data.train.table)
    assert list(data.train.texts())[2] == "first text 2 ||| second text 2"
    recipe = {"dataset_text_field": names[0], "dataset_text_pair_field": names[1]}
    again = prepare(rows_with(*names, idx=7), **recipe)
    assert again.found == {} and again.train.fingerprint == data.train.fingerprint
    swapped = prepare(rows_with(*names), dataset_text_field=names[1], text_pair=names[0])
    assert swapped.train.fingerprint != data.train.fingerprint


def test_columns_that_could_be_two_texts_or_two_pairs_are_asked_for(prepare):
    with pytest.raises(UserError, match=r"'title' and 'body' could hold .* or both by --dataset_text_field and"):
        prepare(rows_with("title", "body"))
    rows = [{**row, "sentence": "one more text"} for row in rows_with("question", "passage")]
    with pytest.raises(UserError, match="could be its pairs: say which by --dataset_text_field and"):
        prepare(rows)
    alone = prepare(rows_with("premise", "hypothesis"), dataset_text_field="premise")
    assert alone.found == {} and FIRST_TYPE not in alone.train.documents.columns
    with pytest.raises(UserError, match=r"lacks the column 'other'.*dataset_text_pair_field"):
        prepare(rows_with("premise", "hypothesis"), dataset_text_field="premise", dataset_text_pair_field="other")
    keys = {"model_name_or_path": "x", "dataset_name": "x", "output_dir": "x", "sentences": ["one"]}
    with pytest.raises(UserError, match="a sentence is one text, and this model reads two"):
        ClassificationRecipe.from_values(**keys, text_pair="hypothesis")


@pytest.mark.parametrize("word", [None, "none", "null", ""])
def test_a_row_is_one_text_where_the_recipe_says_that_there_is_no_second(prepare, word):
    rows = rows_with("text", "text_pair")
    one = prepare(rows, dataset_text_pair_field=word)
    assert one.found == {} and FIRST_TYPE not in one.train.documents.columns
    assert list(one.train.texts())[2] == "first text 2"
    with pytest.raises(UserError, match=r"'premise' and 'hypothesis' could hold its texts"):
        prepare(rows_with("premise", "hypothesis"), dataset_text_pair_field=word)
    keys = {"model_name_or_path": "x", "dataset_name": "x", "output_dir": "x", "label_source": "random"}
    recipe = ClassificationRecipe.from_values(**keys, dataset_text_pair_field=word)  # has no effect, and no harm
    assert recipe.fingerprint() == ClassificationRecipe.from_values(**keys).fingerprint()


def test_a_pair_is_the_same_as_another_where_both_texts_are_in_their_order(prepare):
    same = [("a b", "c", 0), ("A  b", "c", 0), ("a b", "c", 1)]
    others = [("a", "b c", 1), ("c", "a b", 1), ("", "", 0)]
    rows = [{"text": one, "text_pair": two, "label": label} for one, two, label in same + others]
    counts = prepare(rows).train.table.counts
    assert counts["repeated"] == 2 and counts["contradicting"] == 3 and counts["empty"] == 1


def test_a_pair_is_held_out_as_a_whole_and_token_types_follow_their_document(prepare):
    data = prepare(rows_with("premise", "hypothesis"), eval_split_share=0.5)
    both = [*data.train.texts(), *data.evaluation.texts()]
    assert sorted(both) == [f"first text {n} ||| second text {n}" for n in range(6)]
    documents = data.evaluation.documents
    inputs = collate(documents, range(len(documents)))
    types = np.split(inputs["token_type_ids"][0].numpy(), documents.starts[1:-1])
    assert all(of[0] == 0 and of[-1] == 1 and np.diff(of).min() >= 0 for of in types)


def test_a_tokenised_dataset_keeps_its_token_types_without_padding_and_others_than_two_are_refused():
    one = {"input_ids": [5, 6, 7, 8, 0], "token_type_ids": [0, 0, 1, 1, 0], "attention_mask": [1, 1, 1, 1, 0]}
    two = {"input_ids": [5, 6, 0, 0, 0], "token_type_ids": [0, 1, 0, 0, 0], "attention_mask": [1, 1, 0, 0, 0]}
    rows = [one, two]
    documents, _, _ = documents_of([{**row, "label": 1} for row in rows], causal=False)
    inputs = collate(documents, (1, 0))
    assert inputs["token_type_ids"].tolist() == [[0, 1, 0, 0, 1, 1]]
    for types in ([0, 1, 0, 1, 0], [0, 2, 2, 2, 0]):
        with pytest.raises(UserError, match="token_type_ids are 0 for the first text"):
            documents_of([{**rows[0], "token_type_ids": types, "label": 1}], causal=False)
    with pytest.raises(UserError, match="are of classifiers"):
        documents_of(rows, causal=True)
