"""An arrangement holds each example of the step once, keeps to its budget, and depends on nothing but the lengths."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data.pack import MICRO_BATCH_COST, PADDING_SHARE, filled, fixed_length, packed, padded

LENGTHS = st.lists(st.integers(1, 100), min_size=1, max_size=60)
BUDGETS = st.integers(1, 400)


def tokens_of(arrange, lengths, slot):
    """Tokens a micro-batch costs: padded ones pay for the longest row each."""
    within = [lengths[index] for index in slot]
    return sum(within) if arrange is packed else len(within) * max(within)


@pytest.mark.parametrize("arrange", [packed, padded, filled])
@settings(deadline=None)
@given(LENGTHS, BUDGETS)
def test_each_example_is_in_exactly_one_micro_batch(arrange, lengths, budget):
    slots = arrange(lengths, budget)
    assert sorted(index for slot in slots for index in slot) == list(range(len(lengths)))
    assert all(slots)


@pytest.mark.parametrize("arrange", [packed, padded, filled])
@settings(deadline=None)
@given(LENGTHS, BUDGETS)
def test_a_micro_batch_keeps_to_its_budget_unless_one_example_alone_exceeds_it(arrange, lengths, budget):
    for slot in arrange(lengths, budget):
        assert tokens_of(arrange, lengths, slot) <= budget or len(slot) == 1


@settings(deadline=None)
@given(LENGTHS, BUDGETS)
def test_packing_never_leaves_two_micro_batches_that_fit_into_one(lengths, budget):
    sums = sorted(sum(lengths[index] for index in slot) for slot in packed(lengths, budget))
    assert len(sums) < 2 or sums[0] + sums[1] > budget


@settings(deadline=None)
@given(st.lists(st.sampled_from([1, 5, 9]), min_size=1, max_size=30))
def test_the_longest_come_first_and_equal_lengths_in_their_own_order(lengths):
    alone = packed(lengths, 1)
    assert (
        alone
        == padded(lengths, 1)
        == [[index] for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))]
    )


def test_packing_fills_what_padding_leaves_empty():
    lengths = [60, 10, 40, 30, 50, 10]
    assert packed(lengths, 100) == [[0, 2], [4, 3, 1, 5]]
    assert padded(lengths, 100) == [[0], [4, 2], [3, 1, 5]]


@pytest.mark.parametrize("arrange", [packed, padded, filled])
def test_no_examples_make_no_micro_batch(arrange):
    assert arrange([], 100) == []


def padding_share(lengths, slots):
    return 1 - sum(lengths) / sum(tokens_of(padded, lengths, slot) for slot in slots)


@pytest.mark.parametrize("rows", [16, 64, 256])
@pytest.mark.parametrize("budget", [2048, 8192, 32768])
@pytest.mark.parametrize("spread", [0.3, 0.8, 1.2])
def test_at_most_a_tenth_of_a_padded_step_is_padding(rows, budget, spread):
    lengths = np.exp(np.random.default_rng(rows).normal(5.5, spread, rows)).clip(4, 2048).astype(int).tolist()
    share = padding_share(lengths, padded(lengths, budget))
    assert share <= PADDING_SHARE and share <= padding_share(lengths, filled(lengths, budget))


@settings(deadline=None)
@given(LENGTHS, BUDGETS)
def test_padding_takes_more_micro_batches_than_filling_only_where_that_saves_their_cost(lengths, budget):
    fewer, more = filled(lengths, budget), padded(lengths, budget)
    least, most = (sum(tokens_of(padded, lengths, slot) for slot in slots) for slots in (more, fewer))
    assert len(more) <= len(fewer) or least + MICRO_BATCH_COST * (len(more) - len(fewer)) <= most
    assert len(more) <= len(fewer) or padding_share(lengths, fewer) > PADDING_SHARE


@pytest.mark.parametrize(
    ("lengths", "slots"),
    [
        ([7], [[0]]),
        ([3000, 5], [[0], [1]]),
        ([1] * 4, [[0, 1, 2, 3]]),
        ([100, 10, 10, 10], [[0], [1, 2, 3]]),
        ([1000] * 3 + [10], [[0], [1, 2], [3]]),
    ],
)
def test_a_micro_batch_is_added_where_it_saves_more_than_it_costs(lengths, slots):
    assert padded(lengths, 2048) == slots


def by_definition(lengths, budget):
    """Best-fit decreasing as it is defined: each into the fullest micro-batch with room, of equally full ones the first."""
    slots, room = [], []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        fitting = [number for number, left in enumerate(room) if left >= lengths[index]]
        number = min(fitting, key=lambda fit: (room[fit], fit), default=len(slots))
        if number == len(slots):
            slots.append([])
            room.append(budget)
        slots[number].append(index)
        room[number] -= lengths[index]
    return slots


@settings(deadline=None)
@given(st.lists(st.integers(1, 100), max_size=200), st.integers(1, 300))
def test_packing_is_best_fit_decreasing(lengths, budget):
    assert packed(lengths, budget) == by_definition(lengths, budget)


def test_there_are_eight_fixed_lengths_an_octave_and_each_covers_its_tokens():
    found = [fixed_length(tokens) for tokens in range(1, 8193)]
    assert all(
        tokens <= size <= max(64, tokens * 9 / 8 + 1) or size - tokens < 64 for tokens, size in enumerate(found, 1)
    )
    assert sorted({size for size in found if size > 4096}) == list(range(4608, 8193, 512))
    assert found == sorted(found) and [fixed_length(size) for size in found] == found
