"""A document's side of the split, and its coin, hang on what it says and on the seed, never on its row."""

import json
import random

import numpy as np
import pytest
from tests.unit.test_labelled import word_tokenizer

from isotune.config import ClassificationRecipe
from isotune.data.classification.split import prepare_labelled
from isotune.data.contents import content_digest, hash_uniform, held_out, normalised, random_labels
from isotune.data.documents import PreparedData
from isotune.io.errors import UserError


def prepare(folder, texts, **values) -> tuple[PreparedData, PreparedData | None]:
    folder.mkdir(exist_ok=True)
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text, "label": number % 2}) + "\n" for number, text in texts))
    recipe = ClassificationRecipe.from_values(
        model_name_or_path="builtin:bert-tiny", dataset_name=str(path), output_dir=str(folder / "run"), **values
    )
    data = prepare_labelled(recipe, word_tokenizer(), show=False)
    return data.train, data.evaluation


def texts_of(prepared: PreparedData | None) -> list[str]:
    assert prepared is not None
    return list(prepared.texts())


@pytest.fixture(scope="module")
def reviews(shared_data):
    lines = (shared_data / "yelp" / "train.jsonl").open(encoding="utf-8").readlines()
    return list(enumerate(json.loads(line)["text"] for line in lines[:1500]))


@pytest.fixture(scope="module")
def contents(shared_data):
    lines = (shared_data / "yelp" / "train.jsonl").open(encoding="utf-8")
    return np.array([content_digest(normalised(json.loads(line)["text"])) for line in lines], np.uint64)


def test_each_row_is_on_exactly_one_side_and_the_table_counts_them(tmp_path, reviews):
    train, evaluation = prepare(tmp_path, reviews, eval_split_share=0.1)
    assert evaluation is not None
    assert sorted([*texts_of(train), *texts_of(evaluation)]) == sorted(text for _, text in reviews)
    assert 100 < len(evaluation.documents) < 200  # 150 and four standard deviations of 11.6
    assert train.table.counts["held_out"] == len(evaluation.documents)
    assert f"{len(evaluation.documents):,}" in str(train.table) and "on the other side of the split" in str(train.table)
    words = [len(text.split()) for text in texts_of(evaluation)]
    assert (np.diff(evaluation.documents.starts) == np.minimum(words, 510) + 2).all()
    assert (evaluation.documents.ids == evaluation.documents.source_rows).all()


def test_shuffled_and_added_rows_move_no_other_row_to_the_other_side(tmp_path, reviews):
    held = set(texts_of(prepare(tmp_path / "a", reviews[:1000], eval_split_share=0.2)[1]))
    more = random.Random(1).sample(reviews, len(reviews))
    held_of_more = set(texts_of(prepare(tmp_path / "b", more, eval_split_share=0.2)[1]))
    assert held_of_more & {text for _, text in reviews[:1000]} == held
    assert len(held_of_more) > len(held)


def test_documents_of_one_text_are_on_one_side_however_it_is_spelled(tmp_path, reviews):
    spelled = [pair for n, text in reviews[:300] for pair in ((n, text), (n, text.upper()), (n, f" {text}<br />"))]
    train, evaluation = prepare(tmp_path, spelled, eval_split_share=0.3)
    assert evaluation is not None and len(evaluation.documents) % 3 == 0
    assert train.table.counts["in_the_other"]["exactly"] == 0
    assert train.table.counts["repeated"] == len(train.documents) * 2 // 3


def test_another_seed_gives_another_split(tmp_path, reviews):
    one, other = (set(texts_of(prepare(tmp_path, reviews, eval_split_share=0.1, seed=seed)[1])) for seed in (1, 2))
    assert len(one & other) < 50


def test_a_share_that_leaves_a_side_empty_is_refused(tmp_path, reviews):
    with pytest.raises(UserError, match=r"eval_split_share: 1e-09 of the 1500 rows of .* leaves none to evaluate on"):
        prepare(tmp_path, reviews, eval_split_share=1e-9)


def test_a_split_beside_an_evaluation_set_is_a_contradiction(tmp_path):
    with pytest.raises(UserError, match="eval_dataset_name and eval_split_share contradict each other"):
        prepare(tmp_path, [], eval_split_share=0.1, eval_dataset_name="builtin:opinions")


def test_a_flag_for_the_one_puts_the_other_of_a_recipe_out_of_force():
    least = {"model_name_or_path": "a/b", "dataset_name": "c/d", "output_dir": "e"}
    by_share = ClassificationRecipe.from_values(**least, eval_split_share=0.1)
    named = by_share.with_values(eval_dataset_name="f/g")
    assert (named.eval_dataset_name, named.eval_split_share) == ("f/g", 0.0)
    assert named.with_values(eval_split_share=0.2).eval_dataset_name is None


def test_chance_is_even_and_one_purpose_says_nothing_about_another(contents):
    found = hash_uniform("anything", 3, contents)
    assert found.min() >= 0 and found.max() < 1
    assert np.histogram(found, bins=10, range=(0, 1))[0] == pytest.approx([600] * 10, abs=100)  # 4.3 deviations
    heads, kept = random_labels(3, contents), held_out(0.5, 3, contents)
    assert heads.mean() == pytest.approx(0.5, abs=0.03) and kept.mean() == pytest.approx(0.5, abs=0.03)
    assert heads[kept].mean() == pytest.approx(0.5, abs=0.04)
    assert abs(np.corrcoef(random_labels(3, contents), random_labels(4, contents))[0, 1]) < 0.06


def test_a_coins_label_goes_with_the_text_wherever_it_stands(tmp_path, reviews):
    whole, _ = prepare(tmp_path / "a", reviews, label_source="random", seed=5)
    label = dict(zip(texts_of(whole), whole.documents.labels.tolist(), strict=True))
    shuffled = random.Random(2).sample(reviews, 400)
    part, _ = prepare(tmp_path / "b", shuffled, label_source="random", seed=5)
    assert [label[text] for _, text in shuffled] == part.documents.labels.tolist()
    assert part.table.counts["class_names"] == ["heads", "tails"]
