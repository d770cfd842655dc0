"""Shares, amounts, stages and file order: exact, found from the position alone, and the same after a branch."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.errors import DataError, RecipeError
from finetune.plan.mixture import Stretch, drawn, drawn_in, tempered
from finetune.plan.plan import order_of
from finetune.plan.row_order import Order, permute
from finetune.recipe.load import dumps, loads

SHARES = st.lists(st.integers(1, 60), min_size=1, max_size=8).map(tuple)
RECIPE = """\
base: {checkpoint: owner/model}
task: {name: text}
optimizer: {learning_rate: 1e-4}
train: {epochs: 1, batch_size: 4, seed: 3}
"""


def data(sources, **keys):
    listed = ", ".join(f"{{path: {number}.jsonl, {source}}}" for number, source in enumerate(sources))
    return f"data: {{train: [{listed}]" + "".join(f", {key}: {value}" for key, value in keys.items()) + "}\n"


def recipe(*sources, **keys):
    return loads(RECIPE + data(sources, **keys), "recipe.yaml").recipe


def order(sizes, *sources, **keys):
    return order_of(recipe(*(sources or ["" for _ in sizes]), **keys), sizes)


def sources_of(made, positions):
    return np.searchsorted(np.cumsum(made.sizes), made.examples_at(positions), side="right")


def in_sequence(shares, positions):
    """The rule of `drawn`, one source and one position after the other, in fractions."""
    counts = []
    for position in positions:
        rest, remaining, found = int(position), sum(shares), {}
        for source in sorted(range(len(shares)), key=lambda source: (-shares[source], source)):
            found[source] = int(Fraction(rest * shares[source], remaining) + Fraction(1, 2)) if shares[source] else 0
            rest, remaining = rest - found[source], remaining - shares[source]
            if not remaining:
                found |= dict.fromkeys(set(range(len(shares))) - set(found), 0)
                break
        counts.append([found[source] for source in range(len(shares))])
    return counts


@settings(deadline=None)
@given(SHARES, st.sampled_from([0, 10**6, 10**15, 10**17]))
def test_every_position_is_of_one_source_and_counts_are_those_of_the_slow_rule(shares, start):
    positions = np.arange(start, start + 60)
    counts = drawn(shares, positions, is_even=True)
    assert counts.sum(axis=1).tolist() == positions.tolist()
    assert set(np.unique(np.diff(counts, axis=0))) <= {0, 1}
    assert counts.tolist() == in_sequence(shares, positions)


@settings(deadline=None)
@given(SHARES, st.integers(0, 10**9))
def test_a_source_is_as_near_to_its_share_as_is_said(shares, start):
    positions = np.arange(start, start + 200)
    harmonic = sum(1 / number for number in range(1, max(1, len(shares) - 1)))
    most = 1 if len(shares) <= 3 else (1 + harmonic) / 2
    ideal = positions[:, None] * np.array(shares) / sum(shares)
    assert abs(drawn(shares, positions, is_even=True) - ideal).max() <= most + 1e-6


@pytest.mark.slow
@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.sampled_from([0.5, 1, 2, 2.5, 3])), min_size=1, max_size=4),
    st.integers(0, 2),
)
def test_an_epoch_draws_exactly_so_many_of_each_source_and_its_own_epochs_are_whole(sources, epoch):
    sizes, times = zip(*sources, strict=True)
    amounts = [round(Fraction(each) * size) for size, each in sources]
    if not all(amounts):
        return
    made = order(sizes, *(f"epochs: {each}" for each in times))
    assert made.examples_per_epoch == sum(amounts)
    drawn_by_then = np.concatenate([made.examples_of(step) for step in range(1, made.last_step_of(epoch + 1) + 1)])
    of_this = drawn_by_then[epoch * sum(amounts) :]
    firsts = np.cumsum([0, *sizes])
    assert np.histogram(of_this, firsts)[0].tolist() == amounts
    for number, (first, size) in enumerate(zip(firsts, sizes, strict=False)):
        mine = drawn_by_then[(drawn_by_then >= first) & (drawn_by_then < first + size)] - first
        for lap in range(len(mine) // size):
            assert (
                mine[lap * size : (lap + 1) * size].tolist() == permute(np.arange(size), size, 3, number, lap).tolist()
            )


def test_an_epoch_that_draws_nothing_of_a_source_is_refused():
    with pytest.raises(DataError, match=r"data.train\[1\].epochs: 0.01 draws none of 20 examples"):
        order((10, 20), "", "epochs: 0.01")


def test_once_for_each_source_draws_each_example_once():
    made = order((10, 7), "epochs: 1", "")
    assert sorted(made.examples_at(np.arange(17)).tolist()) == list(range(17))


def test_a_temperature_makes_the_same_integers_everywhere():
    assert tempered((1_000_000, 10_000, 100), 2.0) == (1_000_000, 100_000, 10_000)
    assert tempered((1_000_000, 10_000, 100), 3.3) == (1_000_000, 247_708, 61_359)
    assert tempered((10**12, 1), 1.01)[1] == 1
    made = order((900, 100), temperature=2)
    assert made.examples_per_epoch == 1000
    assert np.bincount(sources_of(made, np.arange(1000))).tolist() == [750, 250]
    assert order((900, 100), temperature=1) == order((900, 100)) == Order(3, 4, (900, 100))


def test_a_sequence_is_the_files_as_they_are_one_after_another():
    made = order((5, 3), order="sequential")
    assert made.examples_at(np.arange(16)).tolist() == 2 * list(range(8))
    assert order((5, 3), "epochs: 2", "epochs: 1", order="sequential").examples_at(np.arange(13)).tolist() == [
        *(2 * [*range(5)]),
        *range(5, 8),
    ]


def test_a_sequence_with_weights_keeps_the_order_of_each_file():
    made = order((5, 30), "weight: 1", "weight: 3", order="sequential")
    examples = made.examples_at(np.arange(35))
    assert examples[examples < 5].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3]
    assert examples[examples >= 5].tolist() == list(range(5, 31))
    assert np.bincount(sources_of(made, np.arange(20, 28))).tolist() == [2, 6]


def test_a_curriculum_goes_through_the_sources_each_shuffled():
    made = order((50, 30, 20), order="curriculum")
    assert sources_of(made, np.arange(200)).tolist() == 2 * (50 * [0] + 30 * [1] + 20 * [2])
    examples = made.examples_at(np.arange(100))
    assert sorted(examples.tolist()) == list(range(100)) and examples[:50].tolist() != list(range(50))
    assert made.examples_at(np.arange(50)).tolist() != made.examples_at(np.arange(100, 150)).tolist()


def test_stages_change_the_shares_within_an_epoch():
    made = order((60, 40), "weight: [3, 1, 0]", "weight: [1, 1, 1]", order="curriculum")
    assert made.stretches == (Stretch(33, (3, 1)), Stretch(33, (1, 1)), Stretch(34, (0, 1)))
    for epoch in (0, 100, 10**9):
        edges = np.array([0, 33, 66, 100]) + epoch * 100
        counts = [
            np.bincount(sources_of(made, np.arange(*each)), minlength=2).tolist()
            for each in zip(edges, edges[1:], strict=False)
        ]
        assert counts == [[25, 8], [17, 16], [0, 34]]


ORDERS = {
    "amounts": lambda: order((7, 11, 3), "epochs: 2", "epochs: 0.5", ""),
    "tempered": lambda: order((7, 11, 3), temperature=3),
    "sequence": lambda: order((7, 11, 3), order="sequential"),
    "mixed sequence": lambda: order((7, 11, 3), "weight: 0.7", "weight: 0.2", "weight: 0.1", order="sequential"),
    "curriculum": lambda: order((7, 11, 3), order="curriculum"),
    "stages": lambda: order((7, 11, 3), "weight: [2, 0]", "weight: [1, 1]", "weight: [0, 4]", order="curriculum"),
}


@pytest.mark.parametrize("name", ORDERS)
def test_seeking_finds_what_walking_finds_and_draws_of_a_source_count_up(name):
    made = ORDERS[name]()
    walked = made.examples_at(np.arange(1500))
    some = [0, 700, 1499]
    assert [int(made.examples_at(np.array([position]))[0]) for position in some] == walked[some].tolist()
    counted, firsts = [0, 0, 0], [0, 7, 18]
    for position, source in enumerate(sources_of(made, np.arange(1500))):
        lap, within = divmod(counted[source], made.sizes[source])
        if made.is_shuffled:
            within = int(permute(np.array([within]), made.sizes[source], 3, int(source), lap)[0])
        assert walked[position] == firsts[source] + within
        counted[source] += 1
    assert made.drawn_of_sources(np.array([1500])).tolist() == [counted]


@pytest.mark.parametrize("name", ORDERS)
def test_steps_are_the_positions_in_turn_and_none_crosses_the_end_of_an_epoch(name):
    made = ORDERS[name]()
    last = made.last_step_of(5)
    positions = [made.positions_of(step) for step in range(1, last + 1)]
    assert np.array_equal(np.concatenate(positions), np.arange(5 * made.examples_per_epoch))
    assert not any(each[0] // made.examples_per_epoch < each[-1] // made.examples_per_epoch for each in positions)
    far = 10**9 // made.examples_per_epoch * made.steps_per_epoch + 1
    assert len(made.examples_of(far)) == 4


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize(("seed", "batch_size"), [(3, 5), (4, 4)])
def test_a_branch_keeps_sources_and_amounts_whatever_its_seed_and_batch_size(name, seed, batch_size):
    before = ORDERS[name]()
    keys = {"stretches": before.stretches, "is_shuffled": before.is_shuffled}
    made = Order(seed, batch_size, before.sizes, None, before, 3, before.drawn_after(3), **keys)
    positions = np.arange(4 * made.examples_per_epoch)
    assert sources_of(made, positions).tolist() == sources_of(before, positions).tolist()
    assert made.examples_at(positions[:12]).tolist() == before.examples_at(positions[:12]).tolist()
    if seed == before.seed or not before.is_shuffled:
        assert made.examples_at(positions).tolist() == before.examples_at(positions).tolist()
    for first, size in zip((0, 7, 18), made.sizes, strict=True):
        examples = made.examples_at(positions)
        mine = examples[(examples >= first) & (examples < first + size)]
        laps = mine[: len(mine) // size * size].reshape(-1, size)
        assert (np.sort(laps, axis=1) == first + np.arange(size)).all(), "each lap has each example once"


def test_the_new_orders_never_change():
    """Runs that were started with an earlier version resume only as long as these stay as they are."""
    found = {name: make().examples_at(np.arange(10)).tolist() for name, make in ORDERS.items()}
    assert found == {
        "amounts": [5, 16, 0, 19, 2, 4, 9, 1, 15, 3],
        "tempered": [5, 16, 19, 9, 0, 18, 15, 2, 8, 20],
        "sequence": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9],
        "mixed sequence": [0, 7, 1, 2, 3, 18, 4, 5, 8, 6],
        "curriculum": [5, 0, 2, 4, 1, 3, 6, 16, 9, 15],
        "stages": [5, 16, 0, 2, 9, 4, 1, 15, 3, 6],
    }


def test_a_very_long_order_is_exact_beyond_64_bits():
    shares = (3 * 10**9, 2 * 10**9 + 1, 7)
    positions = np.array([sum(shares) - 1, sum(shares), 10**9 * sum(shares)])
    counts = drawn_in((Stretch(sum(shares), shares),), positions)
    assert counts[1].tolist() == list(shares) and counts[2].tolist() == [10**9 * share for share in shares]


@pytest.mark.parametrize(
    ("sources", "keys", "message"),
    [
        (["weight: 1", ""], {}, "some sources have a `weight` and some do not"),
        (["weight: 1", "weight: 2, epochs: 2"], {}, "`weight` is the part of a source, `epochs` its amount"),
        (["epochs: 2", ""], {"temperature": 2}, "data.temperature: makes weights from the sizes of sources"),
        (["weight: 1", "weight: 2"], {"temperature": 2}, "data.temperature: makes weights from the sizes of sources"),
        ([""], {"temperature": 2, "order": "curriculum"}, "data.temperature: has no meaning for `curriculum`"),
        (["weight: [1, 2]"], {}, "a list of weights needs `data.order: curriculum`"),
        (["weight: [1, 2]", "weight: [1]"], {"order": "curriculum"}, "lists of weights of one length"),
        (["weight: [1, 2]", "weight: 1"], {"order": "curriculum"}, "lists of weights of one length"),
        (["weight: 1", "weight: 1"], {"order": "curriculum"}, "lists of weights of one length"),
        (["weight: [1, 0]", "weight: [1, 0]"], {"order": "curriculum"}, "a stage in which every weight is 0"),
        (["weight: [0, 0]"], {"order": "curriculum"}, "must be a weight over 0 like `0.5`, or a list"),
        (["weight: 0"], {}, "must be a weight over 0 like `0.5`, or a list like `[1, 0.5, 0]`, not `0`"),
        (["epochs: 0"], {}, "data.train[0].epochs: must be greater than 0, not `0`"),
        ([""], {"holdout": "[{path: h.jsonl, epochs: 2}]"}, "`epochs` has no meaning for held-out rows"),
        ([""], {"order": "random"}, "data.order: must be `shuffled`, `sequential` or `curriculum`, not `random`"),
    ],
)
def test_what_does_not_fit_together_is_refused(sources, keys, message):
    with pytest.raises(RecipeError) as caught:
        recipe(*sources, **keys)
    assert message in str(caught.value)


def test_a_recipe_with_stages_is_written_and_read_back():
    first = recipe("weight: [3, 1, 0]", "weight: [1, 1, 1]", order="curriculum")
    assert loads(dumps(first), "recipe.yaml").recipe == first
    assert type(first).model_validate_json(first.model_dump_json()) == first
