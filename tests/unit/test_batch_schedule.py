"""The schedule is a pure function of (seed, lengths, recipe); ranks only share it out."""

import itertools
import json
import math
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from isotune.data import balance
from isotune.data.balance import share_out
from isotune.data.batch_schedule import (
    LaidMicrobatches,
    Step,
    StepSchedule,
    assign_to_ranks,
    collate,
    to_device,
    to_device_together,
)
from isotune.data.documents import Documents, Rows
from isotune.data.packing import one_document_per_row, pack

ROW_TOKENS = 32


def made_documents(lengths: list[int], seed: int = 0) -> Documents:
    draw = np.random.default_rng(seed)
    tokens = int(sum(lengths))
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    supervised = draw.random(tokens) < 0.5
    supervised[starts[:-1]] = False
    return Documents(
        input_ids=draw.integers(0, 1000, tokens).astype(np.int32),
        targets=supervised,
        starts=starts,
        source_rows=np.arange(len(lengths), dtype=np.int64),
    )


def made_plan(
    documents: Documents, rows: Rows, batch: int = 3, tokens: int = ROW_TOKENS, seed: int = 7, ranks: int | None = None
) -> StepSchedule:
    return StepSchedule(documents, rows, global_batch_size=batch, microbatch_tokens=tokens, ranks=ranks, seed=seed)


lengths_lists = st.lists(st.integers(2, ROW_TOKENS), min_size=1, max_size=60)


@settings(deadline=None, max_examples=60)
@given(lengths_lists, st.integers(1, 9), st.integers(1, 4))
def test_every_document_is_seen_once_an_epoch_and_nothing_is_dropped(lengths, batch, passes):
    documents = made_documents(lengths)
    plan = made_plan(documents, pack(documents.lengths, ROW_TOKENS, seed=1), batch, passes * ROW_TOKENS)
    for epoch in (0, 1):
        steps = [plan.step(epoch * plan.steps_per_epoch + k) for k in range(plan.steps_per_epoch)]
        seen = [d for step in steps for m in step.microbatches for d in m.documents]
        assert sorted(seen) == list(range(len(lengths)))
        assert {step.epoch for step in steps} == {epoch}
        assert sum(step.supervised_tokens for step in steps) == int(documents.supervised.sum())
        assert sum(step.input_tokens for step in steps) == sum(lengths)
        assert max(m.tokens for step in steps for m in step.microbatches) <= passes * ROW_TOKENS


@settings(deadline=None, max_examples=60)
@given(lengths_lists, st.integers(1, 9), st.integers(1, 4), st.sampled_from([None, 1, 2, 3]))
def test_documents_that_are_padded_are_those_of_the_same_steps_and_fit_when_filled_up(lengths, batch, rows, ranks):
    documents = made_documents(lengths)
    packed_rows, tokens = pack(documents.lengths, ROW_TOKENS, seed=1), rows * ROW_TOKENS
    options = {"global_batch_size": batch, "microbatch_tokens": tokens, "seed": 7}
    packed = StepSchedule(documents, packed_rows, **options)
    padded = StepSchedule(documents, packed_rows, **options, ranks=ranks, padded=True)
    assert padded.steps_per_epoch == packed.steps_per_epoch
    for number in range(padded.steps_per_epoch):
        step, other = padded.step(number), packed.step(number)
        seen = [d for m in step.microbatches for d in m.documents]
        assert sorted(seen) == sorted(d for m in other.microbatches for d in m.documents)
        assert (step.supervised_tokens, step.input_tokens) == (other.supervised_tokens, other.input_tokens)
        for microbatch in step.microbatches:
            own = [lengths[d] for d in microbatch.documents]
            assert len(own) * max(own) <= tokens
        if ranks is None:  # every document in a group is at least as long as every one in the next
            orders = [[lengths[d] for d in m.documents] for m in step.microbatches]
            assert all(min(first) >= max(second) for first, second in itertools.pairwise(orders))


@settings(deadline=None, max_examples=60)
@given(lengths_lists, st.integers(1, 9), st.integers(1, 7))
def test_ranks_share_a_step_out_completely_with_equal_numbers_of_passes(lengths, batch, world_size):
    documents = made_documents(lengths)
    step = made_plan(documents, one_document_per_row(len(documents)), batch).step(0)
    shares = assign_to_ranks(step, world_size)
    assert len(shares) == world_size
    carried = sorted(m.number for share in shares for m in share if m.weight)
    assert carried == [m.number for m in step.microbatches]
    assert {len(share) for share in shares} == {math.ceil(len(step.microbatches) / world_size)}
    assert {m.weight for share in shares for m in share} <= {0.0, 1.0}
    assert all(m.supervised_tokens == 0 for share in shares for m in share if not m.weight)


@settings(deadline=None, max_examples=60)
@given(lengths_lists, st.integers(1, 30), st.integers(1, 4), st.integers(1, 7))
def test_rows_that_are_shared_out_to_ranks_first_are_the_same_rows_in_as_many_microbatches_a_rank(
    lengths, batch, passes, world_size
):
    documents, tokens = made_documents(lengths), passes * ROW_TOKENS
    rows = pack(documents.lengths, ROW_TOKENS, seed=1)
    plan, free = made_plan(documents, rows, batch, tokens), made_plan(documents, rows, batch, tokens, ranks=world_size)
    for number in range(plan.steps_per_epoch):
        step, other = plan.step(number), free.step(number)
        of = [sorted(d for m in s.microbatches for d in m.documents) for s in (step, other)]
        assert of[0] == of[1] and step.supervised_tokens == other.supervised_tokens
        assert [m.number for m in other.microbatches] == list(range(len(other.microbatches)))
        assert max(m.tokens for m in other.microbatches) <= tokens
        shares = assign_to_ranks(other, world_size)
        assert len({len(share) for share in shares}) == 1
        assert all(m.rank == rank for rank, share in enumerate(shares) for m in share if m.weight)
        assert sorted(m.number for share in shares for m in share if m.weight) == [m.number for m in other.microbatches]


def test_equal_cost_and_not_fullness_makes_microbatches():
    documents = made_documents([30, 30, 20, 20, 10, 10])
    plan = made_plan(documents, one_document_per_row(6), batch=6, tokens=60, ranks=1)
    assert sorted(m.tokens for m in plan.step(0).microbatches) == [60, 60]
    plan = made_plan(documents, one_document_per_row(6), batch=6, tokens=80, ranks=1)  # best-fit would make 80 and 40
    assert sorted(m.tokens for m in plan.step(0).microbatches) == [60, 60]


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 50), max_size=7), st.integers(1, 3))
def test_things_are_shared_out_nearly_as_evenly_as_can_be(costs, shares):
    found = share_out(np.array(costs), shares)
    assert sorted(n for share in found for n in share.tolist()) == list(range(len(costs))) and len(found) == shares
    largest = max(sum(costs[n] for n in share) for share in found)

    def largest_of(way: tuple[int, ...]) -> int:
        return max(sum(cost for cost, at in zip(costs, way, strict=True) if at == share) for share in range(shares))

    best = min(largest_of(way) for way in itertools.product(range(shares), repeat=len(costs)))
    assert largest <= best * (4 / 3 - 1 / (3 * shares)) + 1e-9, "Graham's bound"


def test_exchanges_find_what_the_costliest_first_misses():
    assert sorted(sum([3, 3, 2, 2, 2][n] for n in share) for share in share_out(np.array([3, 3, 2, 2, 2]), 2)) == [6, 6]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 9) | st.floats(0.5, 90.0), max_size=60), st.integers(1, 20), st.integers(1, 5))
def test_the_costliest_thing_left_goes_where_least_is(costs, shares, at_once):
    loads, expected = [0.0] * shares, [[] for _ in range(shares)]
    for thing in sorted(range(len(costs)), key=lambda thing: -costs[thing]):
        share = loads.index(min(loads))
        expected[share].append(thing)
        loads[share] += costs[thing]
    with pytest.MonkeyPatch.context() as before_exchanges:
        before_exchanges.setattr(balance, "MAX_SWAPS_PER_SHARE", 0)
        before_exchanges.setattr(balance, "SHARES_AT_ONCE", at_once)
        found = share_out(np.array(costs, float), shares)
    assert [share.tolist() for share in found] == [sorted(things) for things in expected]


@pytest.fixture(scope="module")
def real_lengths(shared_data) -> dict[str, np.ndarray]:
    """Tokens of as many documents as the whole sets have, drawn from the lengths of their slices."""
    found = {}
    for name, tokenizer, field, limit, count in (
        ("guanaco", "opt", "text", 1024, 9846),
        ("imdb", "bert-base-cased", "text", 512, 25_000),
    ):
        encoder = AutoTokenizer.from_pretrained(shared_data / "tokenizers" / tokenizer)
        lines = (shared_data / name / "train.jsonl").read_text().strip().split("\n")[:2000]
        encoded = encoder([json.loads(line)[field] for line in lines], truncation=True, max_length=limit)
        lengths = np.array([len(ids) for ids in encoded["input_ids"]])
        found[name] = np.random.default_rng(0).choice(lengths, count)
    return found


@pytest.mark.parametrize("world_size", [*(pytest.param(size, marks=pytest.mark.slow) for size in (2, 4, 8, 16)), 64])
@pytest.mark.parametrize(
    ("name", "row_tokens", "tokens"),
    [
        ("guanaco", 1024, 1024),
        pytest.param("guanaco", 1024, 32_768, marks=pytest.mark.slow),
        pytest.param("imdb", None, 512, marks=pytest.mark.slow),
        ("imdb", None, 8192),
    ],
)
def test_ranks_wait_3_percent_at_most_over_an_epoch_of_real_data(real_lengths, name, row_tokens, tokens, world_size):
    documents = made_documents(real_lengths[name].tolist())
    rows = pack(documents.lengths, row_tokens, seed=1) if row_tokens else one_document_per_row(len(documents))
    imbalances = []
    schedule = made_plan(documents, rows, 4 * world_size, tokens, ranks=world_size)
    for number in range(schedule.steps_per_epoch):
        step = schedule.step(number)
        if number == schedule.steps_per_epoch - 1 and len(rows) % (4 * world_size):
            continue  # it has fewer than four rows a rank
        # the cost in tokens, from the lengths alone
        loads = [
            sum(n * (1 + n / 12_288) for m in share if m.weight for n in documents.lengths[list(m.documents)].tolist())
            for share in assign_to_ranks(step, world_size)
        ]
        imbalances.append(max(loads) / (sum(loads) / world_size) - 1)
    assert sum(imbalances) / len(imbalances) <= 0.03


@pytest.mark.parametrize("world_size", [2, pytest.param(64, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("padded", "exact"), [(True, False), (False, True), (True, True)])
def test_so_they_do_where_a_model_pads_and_in_many_exact_microbatches(real_lengths, padded, exact, world_size):
    """Rows of a microbatch each, 16 a rank; exact ones do not know the ranks, so a few cannot be shared out evenly."""
    documents = made_documents(real_lengths["guanaco"].tolist())
    rows, ranks = pack(documents.lengths, 1024, seed=1), None if exact else world_size
    options = {"global_batch_size": 16 * world_size, "microbatch_tokens": 1024, "seed": 7}
    schedule = StepSchedule(documents, rows, ranks=ranks, padded=padded, **options)
    imbalances = []
    for number in range(min(schedule.steps_per_epoch - 1, 20)):
        shares = assign_to_ranks(schedule.step(number), world_size)
        # a model that pads computes each text as long as the longest of its microbatch
        filled = [[m for m in share if m.weight] for share in shares]
        loads = []
        for share in filled:
            lengths = [documents.lengths[list(m.documents)] for m in share]
            lengths = [np.full_like(own, own.max()) if padded else own for own in lengths]
            loads.append(sum(float((own * (1 + own / 12_288)).sum()) for own in lengths))
        imbalances.append(max(loads) / (sum(loads) / world_size) - 1)
    assert sum(imbalances) / len(imbalances) <= 0.03


def test_two_plans_of_one_seed_are_equal_and_of_two_seeds_are_not():
    documents = made_documents(list(range(2, 30)))
    rows = pack(documents.lengths, ROW_TOKENS, seed=1)
    one, same, other = (made_plan(documents, rows, seed=seed) for seed in (1, 1, 2))
    numbers = range(one.steps_per_epoch)
    assert [one.step(k) for k in reversed(numbers)] == [same.step(k) for k in reversed(numbers)]
    assert [one.step(k) for k in numbers] != [other.step(k) for k in numbers]


def test_each_epoch_has_its_own_order():
    documents = made_documents([5] * 40)
    plan = made_plan(documents, one_document_per_row(40))
    first, second = ([plan.step(e * plan.steps_per_epoch + k) for k in range(plan.steps_per_epoch)] for e in (0, 1))
    assert [s.microbatches for s in first] != [s.microbatches for s in second]


def test_the_last_step_of_an_epoch_may_be_smaller():
    documents = made_documents([ROW_TOKENS] * 7)
    plan = made_plan(documents, one_document_per_row(7), batch=3)
    assert [plan.step(k).documents for k in range(4)] == [3, 3, 1, 3]


def test_a_bigger_microbatch_changes_neither_documents_nor_denominator_of_a_step():
    documents = made_documents([5, 9, 13, 21, 30, 2, 17, 8])
    rows = pack(documents.lengths, ROW_TOKENS, seed=1)
    small, big = made_plan(documents, rows, tokens=ROW_TOKENS), made_plan(documents, rows, tokens=4 * ROW_TOKENS)
    for k in range(small.steps_per_epoch):
        assert len(big.step(k).microbatches) <= len(small.step(k).microbatches)
        assert big.step(k).supervised_tokens == small.step(k).supervised_tokens
        documents_of = [sorted(d for m in p.step(k).microbatches for d in m.documents) for p in (small, big)]
        assert documents_of[0] == documents_of[1]


def made_step(costs: list[float]) -> Step:
    each = np.arange(len(costs) + 1)
    laid = LaidMicrobatches(each[:-1], each, np.full(len(costs), 10), np.full(len(costs), 5), np.array(costs))
    return Step(0, 0, laid)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=20), st.integers(1, 5))
def test_the_costliest_goes_first_to_the_rank_that_has_the_least_and_room(costs, world_size):
    room = math.ceil(len(costs) / world_size)
    expected: list[list[int]] = [[] for _ in range(world_size)]
    for number in sorted(range(len(costs)), key=costs.__getitem__, reverse=True):  # a stable sort, so ties by number
        by_load = sorted(range(world_size), key=lambda rank: sum(costs[n] for n in expected[rank]))
        expected[next(rank for rank in by_load if len(expected[rank]) < room)].append(number)
    shares = assign_to_ranks(made_step([float(cost) for cost in costs]), world_size)
    assert [[m.number for m in share if m.weight] for share in shares] == [sorted(numbers) for numbers in expected]
    idle = {m.number for share in shares for m in share if not m.weight}
    assert idle <= {costs.index(min(costs))}


@settings(deadline=None, max_examples=20)
@given(lengths_lists)
def test_a_microbatch_costs_what_its_products_and_its_attention_do(lengths):
    documents = made_documents(lengths)
    step = made_plan(documents, one_document_per_row(len(lengths)), batch=len(lengths), tokens=4 * ROW_TOKENS).step(0)
    for microbatch in step.microbatches:
        squares = sum(lengths[d] ** 2 for d in microbatch.documents)
        assert microbatch.cost == pytest.approx(microbatch.tokens + squares / 12_288, rel=1e-9)


@pytest.mark.parametrize(("rows", "batch", "steps"), [(6, 3, 2), (7, 3, 3), (1, 3, 1), (3, 1, 3)])
def test_an_epoch_has_as_many_steps_as_its_rows_fill(rows, batch, steps):
    assert made_plan(made_documents([2] * rows), one_document_per_row(rows), batch).steps_per_epoch == steps


def test_a_step_cannot_be_changed_and_empty_data_has_none():
    step = made_step([1.0])
    with pytest.raises(FrozenInstanceError):
        step.number = 2
    with pytest.raises(FrozenInstanceError):
        step.microbatches[0].weight = 2.0
    with pytest.raises(AssertionError, match="empty data"):
        made_plan(made_documents([]), one_document_per_row(0))


@pytest.mark.parametrize(
    "lengths", [[15, 9, 5, 13, 15, 5], [22, 15, 6, 6, 12, 9, 19, 3], [7, 15, 21, 4, 27, 11, 10, 14, 17]]
)
@pytest.mark.parametrize("ranks", [None, 1])
def test_where_equal_cost_needs_more_microbatches_than_best_fit_the_fewest_hold_every_document(lengths, ranks):
    """Sharing these out by cost leaves a group of more than 32 tokens, in as many groups as best-fit needs."""
    documents = made_documents(lengths)
    plan = made_plan(documents, one_document_per_row(len(lengths)), batch=len(lengths), ranks=ranks)
    found = [m.documents for m in plan.step(0).microbatches]
    assert sorted(d for group in found for d in group) == list(range(len(lengths)))
    assert len(found) == math.ceil(sum(lengths) / ROW_TOKENS)
    assert all(list(group) == sorted(group, key=list(plan._order(0)).index) for group in found), "in the step's order"


def test_an_epoch_with_texts_of_its_own_has_its_own_rows():
    """Four documents a row each in epoch 0, and others in epoch 1; epoch 2 begins anew."""
    documents = made_documents([5] * 8)
    rows = Rows(np.arange(8), np.arange(9), epochs=2)
    plan = made_plan(documents, rows, batch=4, tokens=4 * ROW_TOKENS)
    assert plan.steps_per_epoch == 1
    seen = [sorted(d for m in plan.step(epoch).microbatches for d in m.documents) for epoch in range(4)]
    assert seen == [[0, 1, 2, 3], [4, 5, 6, 7]] * 2


@pytest.mark.parametrize(
    ("labels", "dtype"),
    [
        (np.array([2, 0, 1]), torch.int64),
        (np.array([2, 0, 1], np.int32), torch.int64),
        (np.array([0.5, -1.25, 3.0]), torch.float32),
        (np.array([[1, 0], [0, 0], [1, 1]], np.float32), torch.float32),
    ],
)
def test_labels_are_the_targets_of_their_documents(labels, dtype):
    documents = replace(made_documents([3, 2, 4]), targets=labels)
    inputs = collate(documents, (2, 0))
    assert inputs["targets"].dtype == dtype
    assert inputs["targets"].tolist() == labels[[2, 0]].tolist()
    assert "supervised_positions" not in inputs


class Gpu:
    """What stands for a device that is not here: tensors are moved to it as they are, and counted."""

    def __init__(self, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.type, self.copies = kind, 0
        stock = torch.Tensor.to

        def to(tensor, *where, **how):
            if where[:1] != (self,):
                return stock(tensor, *where, **how)
            self.copies += 1
            assert how == ({"non_blocking": True} if kind == "cuda" else {})
            return tensor.clone()

        monkeypatch.setattr(torch.Tensor, "to", to)
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)


@pytest.mark.parametrize("kind", ["cpu", "cuda", "mps"])
def test_inputs_come_to_a_device_as_they_are_and_to_a_gpu_by_one_copy(kind, monkeypatch):
    documents = made_documents([3, 2, 4])
    numbers = replace(documents, targets=np.array([0.1, -2.5, float("inf")], np.float32))
    several = [collate(which, (2, 0, 1)) for which in (documents, numbers)]
    device = torch.device("cpu") if kind == "cpu" else Gpu(kind, monkeypatch)
    for moved in (to_device_together(several, device), [to_device(inputs, device) for inputs in several]):
        for before, after in zip(several, moved, strict=True):
            assert list(after) == list(before)
            assert after["cu_seq_lens_k"] is after["cu_seq_lens_q"]
            for name, value in before.items():
                if isinstance(value, torch.Tensor):
                    assert after[name].dtype == value.dtype and torch.equal(after[name], value), name
                else:
                    assert after[name] == value
    tensors = sum(isinstance(v, torch.Tensor) for inputs in several for v in inputs.values()) - len(several)
    assert kind == "cpu" or device.copies == {"cuda": 1 + 2, "mps": 2 * tensors}[kind]
    assert to_device_together([], device) == []


def test_ranks_are_balanced_by_cost():
    documents = made_documents([32, 32, 16, 16, 8, 8, 8, 8])
    step = StepSchedule(documents, one_document_per_row(8), global_batch_size=8, microbatch_tokens=32, seed=0).step(0)
    loads = [sum(m.tokens for m in share if m.weight) for share in assign_to_ranks(step, 2)]
    assert loads == [64, 64]


@settings(deadline=None, max_examples=60)
@given(lengths_lists)
def test_collated_targets_are_predicted_from_the_token_before_them(lengths):
    documents = made_documents(lengths)
    microbatch = (
        StepSchedule(
            documents,
            one_document_per_row(len(lengths)),
            global_batch_size=len(lengths),
            microbatch_tokens=sum(lengths),
            seed=3,
        )
        .step(0)
        .microbatches[0]
    )
    inputs = collate(documents, microbatch.documents)
    position, expected = 0, []
    for d in microbatch.documents:  # token by token
        a, b = documents.starts[d], documents.starts[d + 1]
        for offset, t in enumerate(range(a, b)):
            assert inputs["input_ids"][0, position] == documents.input_ids[t]
            assert inputs["position_ids"][0, position] == offset
            if documents.supervised[t]:
                expected.append((position - 1, int(documents.input_ids[t])))
            position += 1
    found = list(zip(inputs["supervised_positions"].tolist(), inputs["targets"].tolist(), strict=True))
    assert found == expected
    ends = np.cumsum([0] + [int(documents.lengths[d]) for d in microbatch.documents]).tolist()
    assert inputs["cu_seq_lens_q"].tolist() == ends
    assert inputs["max_length_q"] == max(lengths)


def test_a_row_longer_than_a_microbatch_is_a_bug_and_not_cut():
    documents = made_documents([ROW_TOKENS])
    with pytest.raises(AssertionError, match="must fit"):
        made_plan(documents, one_document_per_row(1), tokens=ROW_TOKENS - 1)


@settings(deadline=None, max_examples=30)
@given(lengths_lists, st.integers(1, 9), st.integers(1, 4), st.booleans(), st.integers(1, 30))
def test_the_costliest_microbatch_of_a_run_has_the_most_tokens_filled_up_where_texts_are_padded(
    lengths, batch, rows, padded, steps
):
    documents = made_documents(lengths)
    plan = StepSchedule(
        documents, one_document_per_row(len(lengths)), global_batch_size=batch, microbatch_tokens=rows * ROW_TOKENS,
        padded=padded, seed=7,
    )  # fmt: skip
    step, found = plan.costliest(steps)
    assert found in plan.step(step.number).microbatches and step.number < steps
    for number in range(min(steps, plan.steps_per_epoch)):
        for other in plan.step(number).microbatches:
            assert other.cost <= found.cost if padded else other.tokens <= found.tokens
