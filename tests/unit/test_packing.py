"""Packing against the sequential best-fit-decreasing that it stands for."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isotune.data.packing import one_document_per_row, pack


def best_fit_decreasing(lengths: list[int], capacity: int) -> list[int]:
    """The remaining room of each row, one document at a time into the fullest row that holds it."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting, key=rooms.__getitem__)] -= length
        else:
            rooms.append(capacity - length)
    return rooms


@st.composite
def packable(draw) -> tuple[list[int], int]:
    capacity = draw(st.sampled_from([1, 2, 7, 16, 100, 1024]))
    few_lengths = st.lists(st.integers(1, capacity), min_size=1, max_size=4, unique=True)
    length = st.sampled_from(draw(few_lengths)) if draw(st.booleans()) else st.integers(1, capacity)
    return draw(st.lists(length, max_size=120)), capacity


@settings(max_examples=300, deadline=None)
@given(packable(), st.integers(0, 2**32))
def test_every_document_is_in_exactly_one_row_and_no_row_is_over_capacity(problem, seed):
    lengths, capacity = np.array(problem[0], np.int64), problem[1]
    rows = pack(lengths, capacity, seed)
    assert sorted(rows.documents.tolist()) == list(range(len(lengths)))
    held = [int(lengths[rows[row]].sum()) for row in range(len(rows))]
    assert all(0 < tokens <= capacity for tokens in held)
    assert rows.lengths(lengths).tolist() == held


@settings(max_examples=300, deadline=None)
@given(packable(), st.integers(0, 2**32))
def test_rows_are_as_full_as_sequential_best_fit_decreasing_leaves_them(problem, seed):
    lengths, capacity = problem
    rows = pack(np.array(lengths, np.int64), capacity, seed)
    rooms = capacity - rows.lengths(np.array(lengths, np.int64))
    assert sorted(rooms.tolist()) == sorted(best_fit_decreasing(lengths, capacity))


def test_three_thousand_guanaco_like_lengths_need_the_rows_of_the_sequential_algorithm():
    lengths = np.clip(np.random.default_rng(3).lognormal(6.0, 0.85, 3_000).astype(np.int64), 2, 1_024)
    assert len(pack(lengths, 1_024, seed=1)) == len(best_fit_decreasing(lengths.tolist(), 1_024))


@pytest.mark.parametrize("capacity", [2**16 - 1, 2**16, 100_000, 2**17, 10**6])
def test_lengths_beyond_16_bits_are_packed_as_others(capacity):
    lengths = np.append(np.random.default_rng(capacity).integers(1, capacity + 1, 200), capacity)
    rooms = capacity - pack(lengths, capacity, seed=1).lengths(lengths)
    assert sorted(rooms.tolist()) == sorted(best_fit_decreasing(lengths.tolist(), capacity))


def test_equal_input_packs_equally_and_another_seed_mixes_documents_of_one_length_otherwise():
    lengths = np.array([300, 300, 300, 300, 724, 724, 724, 724, 10, 10])
    first, again, other = (pack(lengths, 1_024, seed) for seed in (5, 5, 6))
    assert first.documents.tolist() == again.documents.tolist()
    assert first.starts.tolist() == again.starts.tolist() == other.starts.tolist()
    assert first.documents.tolist() != other.documents.tolist()


def test_rows_are_those_recorded_once_whatever_the_machine_and_numpy():
    lengths = np.array([5, 3, 7, 2, 4, 1, 3, 3])
    assert pack(lengths, 8, seed=0).documents.tolist() == [2, 5, 0, 1, 4, 6, 7, 3]


def test_an_unpacked_run_has_one_document_a_row_in_their_order():
    rows = one_document_per_row(4)
    assert [rows[row].tolist() for row in range(len(rows))] == [[0], [1], [2], [3]]


def test_no_documents_make_no_rows():
    assert len(pack(np.zeros(0, np.int64), 8, seed=0)) == 0


@pytest.mark.parametrize("lengths", [[9], [0], [3, 9]])
def test_a_length_that_no_row_can_hold_is_a_bug_of_the_caller(lengths):
    with pytest.raises(AssertionError):
        pack(np.array(lengths), 8, seed=0)
