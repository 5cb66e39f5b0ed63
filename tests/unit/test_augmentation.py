"""Augmented training texts: what becomes of a text, how often, in which epoch, and what stays as it is."""

import hashlib
import json
import random
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.test_labelled import WORDS, word_tokenizer

from isotune.config import ClassificationRecipe, Recipe
from isotune.data.batch_schedule import StepSchedule
from isotune.data.classification.augmentation import Augmentation, Counts, epochs_of, read_synonyms
from isotune.data.classification.split import prepare_labelled
from isotune.data.contents import content_digest, contents_of, normalised
from isotune.data.documents import Documents, PreparedData, RunData
from isotune.io.errors import UserError
from isotune.preflight.resources.compute import count_work
from isotune.run.identity import RunIdentity

TABLE = {"the": ("this",), "good": ("fine", "great", "nice"), "food": ("meal", "dish")}
RATES = st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0])


def slowly(text: str, seed: int, epoch: int, rates: tuple[float, float, float]) -> tuple[list[str], dict[str, int]]:
    """The words of an augmented text, and what was done, by a loop over words; `rates`: synonyms, swap, dropout."""
    words = text.split()
    key = f"augmented {seed} {epoch} ".encode() + content_digest(normalised(text)).to_bytes(8, "little")
    numbers = struct.unpack(f"<{4 * len(words)}Q", hashlib.shake_256(key).digest(32 * len(words)))
    draw = [[(numbers[4 * word + kind] // 2**11) / 2**53 for kind in range(4)] for word in range(len(words))]
    done = {"replaced": 0, "swapped": 0, "dropped": 0}
    for word, (whether, which, *_) in enumerate(draw):
        others = TABLE.get(words[word].strip(".,!?\"'()-").lower())
        if whether < rates[0] and others and words[word].isalpha():
            new = others[int(which * len(others))]
            words[word] = new.capitalize() if words[word][0].isupper() else new
            done["replaced"] += 1
    word = 0
    while word < len(words) - 1:
        if draw[word][2] < rates[1]:
            words[word], words[word + 1] = words[word + 1], words[word]
            done["swapped"] += 1
            word += 1
        word += 1
    kept = [word for word in range(len(words)) if draw[word][3] >= rates[2]]
    kept = kept or [max(range(len(words)), key=lambda word: draw[word][3])]
    done["dropped"] = len(words) - len(kept)
    return [words[word] for word in kept], done


@pytest.mark.parametrize("rates", [(0.8, 0.0, 0.0), (0.0, 0.3, 0.0), (0.0, 0.0, 0.3), (0.5, 0.2, 0.1), (1.0, 1.0, 1.0)])
def test_texts_and_counts_are_those_of_a_loop_over_words(shared_data, rates):
    lines = (shared_data / "yelp" / "train.jsonl").open(encoding="utf-8").readlines()[:150]
    # no marks beside a word of the table: the loop knows whole words only
    texts = [" ".join(word for word in json.loads(line)["text"].split() if word.isalpha()) for line in lines]
    augmentation = Augmentation(7, word_dropout=rates[2], word_swap=rates[1], synonym_rate=rates[0], synonyms=TABLE)
    counts, expected = Counts(), dict.fromkeys(("replaced", "swapped", "dropped"), 0)
    changed = 0
    for epoch in range(3):
        for text in texts:
            made = augmentation.augment(text, content_digest(normalised(text)), epoch, counts)
            words, done = slowly(text, 7, epoch, rates)
            assert made.split() == words
            changed += made != text
            expected = {name: number + done[name] for name, number in expected.items()}
    assert {name: getattr(counts, name) for name in expected} == expected
    for kind, rate in zip(("replaced", "swapped", "dropped"), rates, strict=True):
        assert (expected[kind] > 100) == (rate > 0)
    assert (counts.texts, counts.changed) == (450, changed)
    assert counts.words == 3 * sum(len(text.split()) for text in texts)


@settings(deadline=None)
@given(text=st.text(max_size=60), dropout=RATES, swap=RATES, epoch=st.integers(0, 3))
def test_a_text_keeps_one_of_its_own_words_at_least_and_without_rates_all_of_itself(text, dropout, swap, epoch):
    (content,) = contents_of([text]).tolist()
    own = sorted(text.split())
    made = Augmentation(1, word_dropout=dropout, word_swap=swap).augment(text, content, epoch, Counts())
    assert bool(made.split()) == bool(own) and set(made.split()) <= set(own)
    swapped = Augmentation(1, word_swap=swap).augment(text, content, epoch, Counts())
    assert sorted(swapped.split()) == own and len(swapped) == len(text)
    if not dropout:
        assert made == swapped
    assert Augmentation(1, synonyms=TABLE).augment(text, content, epoch, Counts()) == text


def test_a_synonym_keeps_the_marks_and_the_capital_of_its_word_and_white_space_stays():
    augmentation = Augmentation(3, synonym_rate=1.0, synonyms={"good": ("well made",)})
    assert augmentation.augment(" (Good)\n\tgood,  bad  ", 1, 0, Counts()) == " (Well made)\n\twell made,  bad  "
    assert Augmentation(3, word_dropout=1.0).augment("a b c d", 1, 0, Counts()).strip() in ["a", "b", "c", "d"]


def test_a_table_of_synonyms_is_lines_with_tabs_or_json(tmp_path):
    lines = tmp_path / "table.tsv"
    lines.write_text("Good\tfine\tgreat\n\nfood\tmeal\ngood\tnice\tfine\n", "utf-8")
    words = tmp_path / "table.json"
    words.write_text('{"good": ["fine", "great", "nice"], "FOOD": "meal"}', "utf-8")
    expected = {"good": ("fine", "great", "nice"), "food": ("meal",)}
    assert read_synonyms(str(lines)) == read_synonyms(str(words)) == expected


BROKEN = {
    "absent.tsv": (None, "there is no such file"),
    "one.tsv": ("good\tfine\nfood\n", "line 2 has not a word and its synonyms between tabs"),
    "phrase.tsv": ("very good\tfine\n", "line 1 has not a word"),
    "empty.tsv": ("\n", "holds no word"),
    "cut.json": ('{"good": ["fi', "is not JSON"),
    "list.json": ('["good"]', "has no keys"),
    "number.json": ('{"good": [1]}', "at 'good'"),
    "bytes.tsv": (b"\xff\t\xfe", "is not UTF-8"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_table_that_cannot_be_read_is_refused_before_the_data_are(tmp_path, name):
    content, sentence = BROKEN[name]
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    recipe = recipe_of(tmp_path, dataset_name=str(tmp_path / "no_data.jsonl"), augment_synonyms=str(tmp_path / name))
    with pytest.raises(UserError, match=f"{name}.*{sentence}") as found:
        prepare_labelled(recipe, word_tokenizer(), show=False)
    assert "augment_synonyms" in str(found.value) and "\n" not in str(found.value)


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"augment_word_dropout": 1.1}, "augment_word_dropout is 1.1: it takes a number of at least 0 and at most 1"),
    ({"augment_word_swap": -0.1}, "augment_word_swap is -0.1: it takes a number of at least 0 and at most 1"),
    ({"augment_synonym_rate": 0.5}, "augment_synonym_rate has no effect: it needs augment_synonyms"),
    ({"augment_word_swap": 0.1, "dataset_text_pair_field": "other"}, "only texts that stand alone are augmented"),
    ({"augment": "{}"}, "say augment_word_dropout, augment_word_swap or augment_synonyms"),
]


@pytest.mark.parametrize(("keys", "sentence"), MISTAKES)
def test_keys_without_meaning_are_refused(tmp_path, keys, sentence):
    with pytest.raises(UserError, match=sentence):
        recipe_of(tmp_path, **keys)


def test_conversations_are_not_augmented_and_a_sentence_says_so():
    with pytest.raises(UserError, match="augment_word_dropout is not a key here: it is of the task class"):
        Recipe.from_values(model_name_or_path="x", dataset_name="x", output_dir="x", augment_word_dropout=0.1)


def test_a_pair_that_the_data_show_is_refused_too(tmp_path):
    rows = [{"premise": "1 2", "hypothesis": "3 4", "label": number % 2} for number in range(8)]
    with pytest.raises(UserError, match="only texts that stand alone are augmented"):
        prepare_labelled(recipe_of(tmp_path, rows, augment_word_swap=0.1), word_tokenizer(), show=False)


def recipe_of(folder, rows: list[dict] | None = None, **values) -> ClassificationRecipe:
    folder.mkdir(exist_ok=True)
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows or []), "utf-8")
    common = {"model_name_or_path": "builtin:bert-tiny", "dataset_name": str(path), "output_dir": str(folder / "run")}
    return ClassificationRecipe.from_values(**{**common, "global_batch_size": 7, **values})


def rows_of(count: int) -> list[dict]:
    """Rows of different texts with 1 to 30 words, every word one token; ids of their own."""
    generator = random.Random(5)
    return [
        {"id": f"row-{number}", "text": f"{WORDS[number % 39]} " + " ".join(generator.choices(WORDS, k=number % 30)),
         "label": number % 3} for number in range(count)
    ]  # fmt: skip


def prepare(folder, rows: list[dict], **values) -> tuple[PreparedData, RunData]:
    data = prepare_labelled(recipe_of(folder, rows, **values), word_tokenizer(), show=False)
    return data.train, data


def tokens_of(documents: Documents, number: int) -> list[int]:
    return documents.input_ids[documents.starts[number] : documents.starts[number + 1]].tolist()


def test_each_epoch_has_its_own_texts_of_the_same_rows_and_the_table_counts_what_was_done(tmp_path):
    rows = rows_of(40)
    plain, _ = prepare(tmp_path / "a", rows, num_train_epochs=2.5)
    train, data = prepare(tmp_path / "b", rows, num_train_epochs=2.5, augment_word_dropout=0.3)
    assert len(train.rows) == len(plain.documents) == 40 and train.rows.epochs == 3 and len(train.documents) == 120
    for name in ("labels", "source_rows", "ids"):
        expected = np.asarray(getattr(plain.documents, name))
        assert np.array_equal(getattr(train.documents, name).reshape(3, 40), np.stack([expected] * 3))
    epochs = [[tokens_of(train.documents, 40 * epoch + row) for row in range(40)] for epoch in range(3)]
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    counted = train.table.counts["augmented"]
    words = 3 * sum(len(row["text"].split()) for row in rows)
    left = sum(len(tokens) - 2 for epoch in epochs for tokens in epoch)
    assert (counted["texts"], counted["words"], counted["dropped"]) == (120, words, words - left)
    assert counted["replaced"] == counted["swapped"] == 0 and 0.2 < counted["dropped"] / words < 0.4
    assert f"{counted['dropped']:,} ({counted['dropped'] / words:.1%})" in str(train.table)
    original = {row["text"] for row in rows}
    assert counted["example"]["text"] in original and counted["example"]["augmented"] not in original
    assert data.train.table.counts["documents"] == 40


def test_what_becomes_of_a_text_hangs_on_what_it_says_and_neither_on_its_row_nor_on_the_others(tmp_path):
    rows, keys = rows_of(40), {"augment_word_dropout": 0.3, "augment_word_swap": 0.3, "num_train_epochs": 2}
    train, _ = prepare(tmp_path / "a", rows, **keys)
    other, data = prepare(tmp_path / "b", random.Random(1).sample(rows, 40), **keys, eval_split_share=0.3)
    assert data.evaluation is not None and 20 <= len(other.rows) < 40
    for epoch in range(2):
        found = [dict(zip(part.documents.ids, (
            tokens_of(part.documents, epoch * len(part.rows) + row) for row in range(len(part.rows))
        ), strict=False)) for part in (train, other)]  # fmt: skip
        assert len(found[1]) == len(other.rows) and found[1].items() <= found[0].items()


def test_the_other_side_of_the_split_is_as_it_was(tmp_path):
    rows = rows_of(60)
    kept = prepare(tmp_path / "a", rows, eval_split_share=0.3)[1].evaluation
    found = prepare(tmp_path / "b", rows, eval_split_share=0.3, augment_word_dropout=0.5)[1].evaluation
    assert kept is not None and found is not None and kept.fingerprint == found.fingerprint
    for name, values in kept.documents.as_arrays().items():
        assert np.array_equal(values, found.documents.as_arrays()[name])
    assert "augmented" not in found.table.counts


def test_rates_of_zero_are_the_recipe_and_the_data_without_the_keys(tmp_path):
    table = tmp_path / "table.tsv"
    table.write_text("1\t2\n")
    rows = rows_of(20)
    zeros = {"augment_word_dropout": 0.0, "augment_word_swap": "0"}
    kept, found = recipe_of(tmp_path, rows), recipe_of(tmp_path, rows, **zeros)
    assert kept.fingerprint() == found.fingerprint() and kept.as_yaml() == found.as_yaml()
    no_synonyms = recipe_of(tmp_path, rows, **zeros, augment_synonyms=str(table), augment_synonym_rate=0)
    data = [prepare_labelled(each, word_tokenizer(), show=False).train for each in (kept, found, no_synonyms)]
    assert len({each.fingerprint for each in data}) == 1 and data[2].rows.epochs == 1
    assert str(data[0].table) == str(data[2].table)


def test_another_table_seed_or_rate_gives_other_data(tmp_path):
    rows, prints = rows_of(20), set()
    keys = {"augment_synonyms": str(tmp_path / "table.tsv"), "augment_synonym_rate": 0.5}
    for number, line in enumerate(("1\t2\n", "1\t3\n")):
        (tmp_path / "table.tsv").write_text(line)
        prints |= {prepare(tmp_path / str(number), rows, **keys)[0].fingerprint}
    for number, more in enumerate(({}, {"seed": 1}, {"augment_synonym_rate": 0.6}, {"num_train_epochs": 2}), start=2):
        prints |= {prepare(tmp_path / str(number), rows, **{**keys, **more})[0].fingerprint}
    assert len(prints) == 5  # the second table stands for itself once more


def test_steps_of_an_epoch_see_each_of_its_own_texts_once(tmp_path):
    train, data = prepare(tmp_path, rows_of(40), num_train_epochs=3, augment_word_dropout=0.3)
    schedule = StepSchedule(train.documents, train.rows, global_batch_size=7, microbatch_tokens=64, seed=3)
    assert schedule.steps_per_epoch == 6
    for padded in (False, True):
        schedule = StepSchedule(
            train.documents, train.rows, global_batch_size=7, microbatch_tokens=64, seed=3, padded=padded
        )
        for epoch in range(3):
            steps = [schedule.step(6 * epoch + number) for number in range(6)]
            seen = [document for step in steps for microbatch in step.microbatches for document in microbatch.documents]
            assert sorted(seen) == list(range(40 * epoch, 40 * epoch + 40))
            assert sum(step.input_tokens for step in steps) == train.documents.lengths[seen].sum()
    step, microbatch = schedule.costliest(18)
    every = [microbatch.cost for number in range(18) for microbatch in schedule.step(number).microbatches]
    assert microbatch.cost == max(every) and microbatch in step.microbatches
    recipe = recipe_of(tmp_path / "plan", rows_of(40), num_train_epochs=3, microbatch_tokens=512)
    work = count_work(recipe, data, 1, exact=True)
    assert (work.documents, work.rows, work.steps, work.steps_per_epoch) == (40, 40, 18, 6)


def test_as_many_epochs_are_prepared_as_the_run_begins(tmp_path):
    for keys, epochs in (({"num_train_epochs": 0.5}, 1), ({"num_train_epochs": 3.0}, 3), ({"max_steps": 6}, 1),
                         ({"max_steps": 7}, 2)):  # fmt: skip
        assert epochs_of(recipe_of(tmp_path, [], **keys), 40) == epochs


def test_a_table_of_synonyms_counts_by_its_content(tmp_path):
    rows = rows_of(8)
    first, moved = tmp_path / "first.tsv", tmp_path / "moved.tsv"
    for file in (first, moved):
        file.write_text("good\tfine\n")
    one, other = (RunIdentity.of(recipe_of(tmp_path, rows, augment_synonyms=str(file))) for file in (first, moved))
    assert not other.differences(one)
    moved.write_text("good\tnice\n")
    changed = RunIdentity.of(recipe_of(tmp_path, rows, augment_synonyms=str(moved)))
    assert changed.differences(one).keys() == {"augment_synonyms"}


def test_a_word_of_many_marks_is_read_in_time_that_grows_with_it():
    word = "a" + "-" * 200_000 + "b"
    augmentation = Augmentation(7, synonym_rate=1.0, synonyms=TABLE)
    text = f"{word} (Good!)"
    made = augmentation.augment(text, content_digest(normalised(text)), 0, Counts())
    assert made in {f"{word} ({other}!)" for other in ("Fine", "Great", "Nice")}
