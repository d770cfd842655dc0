"""Which examples an update uses is a pure function of the seed and the step: complete, even, and found at any distance."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.plan.row_order import Order, derive, permute

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=4).map(tuple)


def epoch_of(order, epoch):
    """Example ids of each step of an epoch, counted from 0."""
    first = epoch * order.steps_per_epoch + 1
    return [order.examples_of(step) for step in range(first, first + order.steps_per_epoch)]


def sources_of(order, positions):
    return np.searchsorted(np.cumsum(order.sizes), order.examples_at(positions), side="right")


@pytest.mark.parametrize("size", [*range(1, 70), 127, 128, 129, 255, 256, 257, 1023, 1024, 1025, 65_537])
def test_a_permutation_has_every_position_once(size):
    assert np.array_equal(np.sort(permute(np.arange(size), size, "key", 0)), np.arange(size))


@settings(deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**63 - 1), st.integers(0, 10**6))
def test_a_permutation_has_every_position_once_for_any_key(size, seed, epoch):
    images = permute(np.arange(size), size, seed, epoch)
    assert images.dtype == np.int64
    assert np.array_equal(np.sort(images), np.arange(size))


def test_a_permutation_of_a_huge_size_is_asked_one_position_at_a_time():
    size = 10**12
    positions = np.array([0, 1, size // 2, size - 1])
    images = permute(positions, size, 0)
    assert len(set(images.tolist())) == 4 and all(0 <= image < size for image in images)
    assert [int(permute(positions[[index]], size, 0)[0]) for index in range(4)] == images.tolist()


def test_a_permutation_leaves_its_positions_alone():
    positions = np.arange(10)
    permute(positions, 10, 0)
    assert positions.tolist() == list(range(10))


def test_a_permutation_looks_random():
    size, keys = 1000, 40
    images = np.array([permute(np.arange(size), size, key) for key in range(keys)])
    fixed_points = (images == np.arange(size)).sum()  # one a permutation is expected
    correlations = [abs(np.corrcoef(image, np.arange(size))[0, 1]) for image in images]
    neighbours = (abs(np.diff(images, axis=1)) == 1).sum()  # two a permutation are expected
    assert fixed_points < 2 * keys and max(correlations) < 0.13 and neighbours < 3.5 * keys


def test_a_derived_seed_depends_on_every_part_and_on_their_order():
    seeds = [derive(0, 1, 2), derive(0, 2, 1), derive(0, 12), derive(1, 1, 2), derive(0, 1, 2, 0), derive("0", 1, "x")]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**64 for seed in seeds)


@pytest.mark.slow
@settings(deadline=None)
@given(SIZES, st.integers(1, 50), st.integers(0, 5), st.integers(0, 3))
def test_every_example_comes_exactly_once_an_epoch_and_no_update_crosses_its_edge(sizes, batch_size, seed, epoch):
    order = Order(seed, batch_size, sizes)
    steps = epoch_of(order, epoch)
    assert np.array_equal(np.sort(np.concatenate(steps)), np.arange(sum(sizes)))
    assert [len(step) for step in steps[:-1]] == [batch_size] * (len(steps) - 1)
    assert 1 <= len(steps[-1]) <= batch_size


@settings(deadline=None)
@given(SIZES, st.data())
def test_unweighted_sources_are_spread_evenly_over_an_epoch(sizes, data):
    order = Order(0, 8, sizes)
    total = sum(sizes)
    until = data.draw(st.integers(1, total))
    drawn = np.bincount(sources_of(order, np.arange(until)), minlength=len(sizes))
    assert all(abs(count - until * size / total) < len(sizes) for count, size in zip(drawn, sizes, strict=True))


@pytest.mark.slow
@settings(deadline=None)
@given(
    st.integers(1, 60),
    st.integers(1, 60),
    st.integers(1, 99),
    st.integers(1, 99),
    st.integers(0, 10**7),
    st.integers(1, 300),
)
def test_each_of_two_weighted_sources_has_its_share_of_every_stretch_to_within_one_row(
    a, b, weight, other, start, length
):
    order = Order(0, 8, (a, b), (weight / 100, other / 100))
    drawn = np.bincount(sources_of(order, np.arange(start, start + length)), minlength=2)
    assert abs(drawn[0] - length * weight / (weight + other)) < 1 + 1e-9


@pytest.mark.slow
@settings(deadline=None)
@given(
    st.lists(st.sampled_from([0.1, 0.5, 1.0, 2.0, 3.5]), min_size=3, max_size=5),
    st.integers(0, 10**6),
    st.integers(1, 300),
)
def test_each_of_many_weighted_sources_has_its_share_of_every_stretch_to_within_a_few_rows(weights, start, length):
    order = Order(0, 8, tuple(7 + 3 * index for index in range(len(weights))), tuple(weights))
    drawn = np.bincount(sources_of(order, np.arange(start, start + length)), minlength=len(weights))
    shares = [weight / sum(weights) for weight in weights]
    # a source divides what the ones before it left over: each adds at most one row to the error
    assert all(
        abs(count - length * share) < number + 1
        for number, (count, share) in enumerate(zip(drawn, shares, strict=True), 1)
    )


def test_a_weighted_source_that_runs_out_starts_a_new_permutation():
    order = Order(3, 4, (5, 100), (1.0, 1.0))
    examples = order.examples_at(np.arange(2 * 5 * 6))
    small = examples[examples < 5].reshape(6, 5)
    assert all(sorted(lap) == list(range(5)) for lap in small.tolist())
    assert len({tuple(lap) for lap in small.tolist()}) > 1
    large = examples[examples >= 5]
    assert len(set(large.tolist())) == len(large) == 30


def test_an_epoch_of_weighted_sources_has_as_many_examples_as_there_are():
    order = Order(0, 8, (10, 20, 3), (0.5, 0.25, 0.25))
    assert order.steps_per_epoch == 5
    assert [len(step) for step in epoch_of(order, 7)] == [8, 8, 8, 8, 1]


def test_equal_weights_are_equal_however_they_are_written():
    first, second = Order(0, 8, (10, 20), (0.1, 0.3)), Order(0, 8, (10, 20), (1.0, 3.0))
    assert np.array_equal(first.examples_at(np.arange(500)), second.examples_at(np.arange(500)))


@pytest.mark.slow
@pytest.mark.parametrize("weights", [None, (0.7, 0.2, 0.1)])
def test_seeking_far_finds_what_walking_there_finds(weights):
    """The source of a position is found by closed formula; here it is counted, source by source, from the start."""
    order = Order(5, 4, (7, 11, 3), weights)
    walked = order.examples_at(np.arange(3000))
    assert np.array_equal(
        np.concatenate([order.examples_at(np.array([position])) for position in range(2900, 3000)]), walked[2900:]
    )
    drawn = [0, 0, 0]
    firsts = [0, 7, 18]
    for position, source in enumerate(sources_of(order, np.arange(3000))):
        epoch, within = divmod(drawn[source], order.sizes[source])
        assert (
            walked[position]
            == firsts[source] + permute(np.array([within]), order.sizes[source], 5, int(source), epoch)[0]
        )
        drawn[source] += 1


@pytest.mark.parametrize("weights", [None, (0.7, 0.2, 0.1)])
def test_a_position_of_ten_to_the_nine_is_found_at_once(weights):
    order = Order(0, 6, (1000, 37, 250), weights)
    per_epoch = order.examples_per_epoch
    step = 10**9 // per_epoch * order.steps_per_epoch + 1
    examples = order.examples_of(step)
    start = 10**9 // per_epoch * per_epoch
    assert np.array_equal(examples, order.examples_at(np.arange(start, start + 6)))
    if weights is None:
        epoch = order.examples_at(np.arange(start, start + per_epoch))
        assert np.array_equal(np.sort(epoch), np.arange(per_epoch))


def test_seeds_epochs_and_sources_have_orders_of_their_own():
    def epoch(seed, number, sizes=(50,)):
        return tuple(np.concatenate(epoch_of(Order(seed, 8, sizes), number)).tolist())

    assert len({epoch(seed, number) for seed in range(5) for number in range(5)}) == 25
    both = np.array(epoch(0, 0, (50, 50)))
    assert both[both < 50].tolist() != (both[both >= 50] - 50).tolist()


def test_the_batch_size_changes_where_updates_end_not_the_order():
    wide, narrow = Order(0, 10, (7, 16)), Order(0, 3, (7, 16))
    assert np.array_equal(np.concatenate(epoch_of(wide, 2)), np.concatenate(epoch_of(narrow, 2)))


def test_the_order_never_changes():
    """Runs that were started with an earlier version resume only as long as these stay as they are."""
    assert permute(np.arange(12), 12, 0, 0, 0).tolist() == [7, 4, 3, 9, 5, 11, 8, 2, 10, 1, 6, 0]
    assert derive(0, 1, 0) == 5492360401230830419
    assert [step.tolist() for step in epoch_of(Order(0, 4, (5, 4)), 1)] == [[5, 4, 6, 1], [7, 2, 8, 3], [0]]
    assert Order(7, 8, (6, 30), (0.25, 0.75)).examples_of(9).tolist() == [22, 19, 35, 0, 18, 17, 33, 2]
    assert permute(np.array([0, 10**9]), 10**10 + 7, 1).tolist() == [6463257952, 3399766440]


@pytest.mark.slow
@settings(deadline=None)
@given(SIZES, st.booleans(), st.lists(st.tuples(st.integers(1, 12), st.integers(0, 2), st.integers(1, 50)), max_size=3))
def test_a_branch_draws_what_is_left_of_its_epoch_once_whatever_its_seed_and_batch_size(sizes, is_weighted, branches):
    weights = tuple(1.0 + number for number in range(len(sizes))) if is_weighted else None
    order = Order(0, 7, sizes, weights)
    for after, seed, batch_size in branches:
        until = order.until + after
        order = Order(seed, batch_size, sizes, weights, order, until, order.drawn_after(until))
    total = sum(sizes)
    epochs = order.start // total + 2
    drawn = [order.positions_of(step) for step in range(1, order.last_step_of(epochs) + 1)]
    assert np.array_equal(np.concatenate(drawn), np.arange(epochs * total))
    assert not any(positions[0] // total < positions[-1] // total for positions in drawn)
    if not is_weighted:
        examples = order.examples_at(np.arange(epochs * total)).reshape(epochs, total)
        assert np.array_equal(np.sort(examples, axis=1), np.tile(np.arange(total), (epochs, 1)))


def test_a_weighted_source_goes_on_with_what_a_branch_has_not_drawn_of_it():
    before = Order(0, 4, (10, 30), (1.0, 1.0))
    order = Order(1, 3, (10, 30), (1.0, 1.0), before, 3, before.drawn_after(3))
    small = [example for example in order.examples_at(np.arange(20)).tolist() if example < 10]
    assert sorted(small) == list(range(10))
    assert order.examples_at(np.arange(12)).tolist() == before.examples_at(np.arange(12)).tolist()
    assert order.examples_at(np.arange(12, 20)).tolist() != before.examples_at(np.arange(12, 20)).tolist()


def test_a_branch_with_the_same_seed_keeps_the_order_of_the_examples():
    before = Order(5, 8, (220,))
    order = Order(5, 16, (220,), None, before, 10, 80)
    assert order.examples_at(np.arange(440)).tolist() == before.examples_at(np.arange(440)).tolist()
    assert order.positions_of(11).tolist() == list(range(80, 96)) and order.last_step_of(1) == 10 + 9
