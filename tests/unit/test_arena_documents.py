"""Tokens of a battle are shared so that no text is cut to nothing, and the mean of both orders is equivariant."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.battles import swapped

from isotune.data.tokenizer import TextEncoder
from isotune.io.errors import UserError
from isotune.models.base.builtin import builtin_tokenizer
from isotune.projects.arena.battles import Battle, Battles
from isotune.projects.arena.encoder import in_both_orders, prepare_competition, share_tokens

CLS, SEP = 0, 2
WORDS = st.lists(st.sampled_from(["good", "bad", "tea", "no", "yes", "the"]), max_size=30).map(" ".join)


@pytest.fixture(scope="module")
def encoder():
    return TextEncoder(builtin_tokenizer("builtin:bert-tiny"))


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 60), st.integers(8, 90))
def test_every_text_keeps_a_fair_share_of_the_room_and_answers_are_treated_alike(prompt, one, other, room):
    kept = share_tokens(prompt, one, other, room)
    assert share_tokens(prompt, other, one, room) == (kept[0], kept[2], kept[1])
    assert all(k <= whole and (k > 0) == (whole > 0) for k, whole in zip(kept, (prompt, one, other), strict=True))
    if prompt + one + other <= room:
        assert kept == (prompt, one, other)
    else:
        assert room - 1 <= sum(kept) <= room
        assert kept[0] >= min(prompt, room // 4) and min(kept[1:]) >= min(one, other, room * 3 // 8)


def battles(*triples, label=0):
    rows = [Battle(str(n), (p,), (a,), (b,), label) for n, (p, a, b) in enumerate(triples)]
    return Battles("rows", tuple(rows), 0, 0)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(WORDS, WORDS, WORDS), min_size=1, max_size=4), st.integers(20, 60))
def test_the_two_documents_hold_the_texts_in_either_order_and_are_the_same_for_exchanged_answers(triples, length):
    encoder = TextEncoder(builtin_tokenizer("builtin:bert-tiny"))
    rows = battles(*triples).battles
    both = in_both_orders(rows, encoder, length)
    turned = in_both_orders([swapped(battle) for battle in rows], encoder, length)
    assert (both.documents.input_ids == turned.documents.input_ids).all()
    assert (both.documents.starts == turned.documents.starts).all() and both.documents.lengths.max() <= length
    assert (both.documents.labels == turned.documents.labels)[~np.repeat(both.identical, 2)].all()
    assert (both.exchanged != turned.exchanged)[~both.identical].all()
    for row, triple in enumerate(triples):
        p, a, b = (tokens.tolist() for tokens in encoder.tokens(triple))
        if len(p) + len(a) + len(b) + 4 > length:
            continue
        given = [CLS, *p, SEP, *a, SEP, *b, SEP]
        exchanged = [CLS, *p, SEP, *b, SEP, *a, SEP]
        documents = [
            both.documents.input_ids[both.documents.starts[d] : both.documents.starts[d + 1]].tolist()
            for d in (2 * row, 2 * row + 1)
        ]
        assert documents == ([exchanged, given] if both.exchanged[row] else [given, exchanged])
        names = both.documents.ids[2 * row : 2 * row + 2].tolist()
        assert names == ([f"{row}/ba", f"{row}/ab"] if both.exchanged[row] else [f"{row}/ab", f"{row}/ba"])
        labels = both.documents.labels[2 * row : 2 * row + 2].tolist()
        assert labels == ([1, 0] if both.exchanged[row] else [0, 1])


def test_the_mean_of_both_orders_is_the_naive_one_and_exactly_equivariant(encoder):
    triples = [("q", "long answer here", "short"), ("q", "a", "b"), ("", "same", "same"), ("x y", "b", "a")]
    rows = battles(*triples).battles
    both = in_both_orders(rows, encoder, 64)
    turned = in_both_orders([swapped(battle) for battle in rows], encoder, 64)
    raw = np.random.default_rng(5).dirichlet(np.ones(3), len(both.documents))  # whatever a model says of documents
    found, other_way = both.swap_average(raw), turned.swap_average(raw)
    assert found[:, [1, 0, 2]].tobytes() == other_way.tobytes()
    names = both.documents.ids.tolist()
    for row in (0, 1, 3):
        ab, ba = raw[names.index(f"{row}/ab")], raw[names.index(f"{row}/ba")]
        naive = [(ab[0] + ba[1]) / 2, (ab[1] + ba[0]) / 2, (ab[2] + ba[2]) / 2]
        assert found[row] == pytest.approx(naive, rel=1e-12)
    assert found[2, 0] == found[2, 1]


def test_a_prompt_is_on_one_side_of_the_split_only_and_one_order_a_row_is_a_coins(tmp_path):
    from isotune.projects.arena.battles import Competition
    from isotune.projects.arena.recipes import ArenaRecipe

    rows = [(f"question {n // 3}", f"answer {n}", f"other {n}") for n in range(300)]
    files = Competition(battles(*rows), battles(*rows[:3]), None)
    said = {"dataset_name": "x", "output_dir": "y", "model_name_or_path": "z", "tune": "full", "eval_split_share": 0.3}
    tokenizer = builtin_tokenizer("builtin:bert-tiny")
    found, kept_battles = prepare_competition(files, ArenaRecipe.from_values(**said, train_orders="one"), tokenizer)
    kept = {battle.group() for battle in kept_battles.battles}
    learned = [battle for battle in files.train.battles if battle.group() not in kept]
    assert 15 < len(kept) < 45 and len(kept_battles) == 3 * len(kept)
    assert len(found.train.documents) == len(learned) == 300 - len(kept_battles)
    assert len(found.evaluation.documents) == 2 * len(kept_battles)
    ids = found.train.documents.ids.tolist()
    assert [name.split("/")[0] for name in ids] == [battle.id for battle in learned]
    assert 0.35 < sum(name.endswith("/ab") for name in ids) / len(ids) < 0.65
    whole, _ = prepare_competition(files, ArenaRecipe.from_values(**said), tokenizer)
    assert (
        len(whole.train.documents) == 2 * len(learned)
        and np.bincount(whole.train.documents.labels).tolist() == [len(learned)] * 2
    )
    with pytest.raises(UserError, match="three texts need at least 12 tokens"):
        in_both_orders(files.train.battles, TextEncoder(tokenizer), 11)
