"""The micro-batches of a step are the same for every world size; only who runs them differs."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data.batches import Batches, Examples
from finetune.data.example import Example
from finetune.data.pack import packed, padded


class Source:
    """Encoded examples in memory: one of each length; token k of example e is 100 e + k."""

    def __init__(self, lengths, rows=None):
        self.offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self.rows = np.array(range(len(lengths)) if rows is None else rows, dtype=np.int64)
        self.targets = np.array(lengths, dtype=np.int64) - 1
        self.cut_tokens = np.zeros(len(lengths), dtype=np.int64)
        self.lengths = lengths

    def __getitem__(self, index):
        return Example(100 * int(index) + np.arange(self.lengths[index]), np.ones(self.lengths[index], dtype=bool))


def all_of(source, first_row=0):
    return source, np.arange(len(source.rows)), first_row


def batches(lengths, budget=20, arrange=packed, **place):
    return Batches(
        Examples([all_of(Source(lengths))]),
        arrange,
        collate=lambda examples: {"examples": examples},
        budget=budget,
        **place,
    )


LENGTHS = st.lists(st.integers(1, 20), min_size=1, max_size=30)


@pytest.mark.parametrize("arrange", [packed, padded])
@settings(deadline=None)
@given(LENGTHS, st.integers(1, 5))
def test_the_slots_of_a_step_do_not_depend_on_the_world_size(arrange, lengths, world_size):
    ids = np.arange(len(lengths))
    alone = {micro_batch.slot: micro_batch.indices for micro_batch in batches(lengths, arrange=arrange).of(ids)}
    ranks = [batches(lengths, arrange=arrange, rank=rank, world_size=world_size).of(ids) for rank in range(world_size)]
    together = [micro_batch for rank in ranks for micro_batch in rank if not micro_batch.is_idle]
    assert len(together) == len(alone)
    assert {micro_batch.slot: micro_batch.indices for micro_batch in together} == alone
    assert sorted(index for indices in alone.values() for index in indices) == ids.tolist()


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 5))
def test_all_ranks_run_equally_many_micro_batches_and_the_surplus_ones_are_idle(lengths, world_size):
    ids = np.arange(len(lengths))
    ranks = [batches(lengths, rank=rank, world_size=world_size).of(ids) for rank in range(world_size)]
    assert len({len(rank) for rank in ranks}) == 1
    slots = sorted(micro_batch.slot for rank in ranks for micro_batch in rank)
    assert slots == list(range(len(slots)))
    idle = [micro_batch.slot for rank in ranks for micro_batch in rank if micro_batch.is_idle]
    assert len(idle) < world_size and sorted(idle) == slots[len(slots) - len(idle) :]


def test_slots_are_dealt_to_the_ranks_in_turn():
    ranks = [batches([20] * 5, rank=rank, world_size=2).of(np.arange(5)) for rank in range(2)]
    assert [[micro_batch.slot for micro_batch in rank] for rank in ranks] == [[0, 2, 4], [1, 3, 5]]


def test_an_idle_micro_batch_repeats_the_first_slot():
    [micro_batch] = batches([5, 5, 5], rank=1, world_size=2).of(np.arange(3))
    assert micro_batch.is_idle and micro_batch.slot == 1 and micro_batch.indices == [0, 1, 2]
    assert len(micro_batch.inputs["examples"]) == 3


def test_a_micro_batch_holds_the_examples_of_its_indices_into_the_step():
    ids = np.array([4, 0, 2])
    [first, second] = batches([3, 9, 8, 9, 12], budget=15).of(ids)
    assert first.indices == [0, 1] and second.indices == [2]
    assert [example.tokens[0] for example in first.inputs["examples"]] == [400, 0]
    assert [example.tokens[0] for example in second.inputs["examples"]] == [200]


def test_examples_count_through_their_sources_and_so_do_their_rows():
    first, second = Source([2, 3, 4], rows=[0, 0, 2]), Source([5, 6], rows=[0, 1])
    examples = Examples([(first, np.array([0, 2]), 0), (second, np.array([0, 1]), 3)])
    assert examples.sizes == (2, 2) and len(examples) == 4
    assert examples.rows.tolist() == [0, 2, 3, 4]
    assert examples.lengths.tolist() == [2, 4, 5, 6]
    assert examples.targets.tolist() == [1, 3, 4, 5]
    assert [examples[index].tokens[0] for index in range(4)] == [0, 200, 0, 100]
    assert [len(examples[index].tokens) for index in range(4)] == [2, 4, 5, 6]


def test_a_source_of_which_nothing_is_chosen_takes_no_place():
    nothing = np.zeros(0, dtype=np.int64)
    examples = Examples(
        [(Source([2]), nothing, 0), all_of(Source([3]), 1), (Source([4]), nothing, 2), all_of(Source([5]), 3)]
    )
    assert [len(examples[index].tokens) for index in range(2)] == [3, 5]
    assert examples.rows.tolist() == [1, 3]
    assert len(Examples([])) == 0


def test_a_micro_batch_is_collated_only_when_its_turn_comes():
    collated = []
    step = Batches(
        Examples([all_of(Source([20] * 5))]),
        packed,
        collate=lambda examples: collated.append(len(examples)) or {"tokens": torch.ones(1)},
        budget=20,
    ).of(np.arange(5))
    assert len(step) == 5 and not collated
    for turn, micro_batch in enumerate(step.on(torch.device("cpu")), 1):
        assert len(collated) == turn and micro_batch.slot == turn - 1


def test_tensors_are_moved_to_the_device_and_nothing_else_is():
    step = Batches(
        Examples([all_of(Source([4, 3]))]),
        packed,
        collate=lambda examples: {"model_inputs": {"ids": torch.ones(7), "row_bounds": [0, 4, 7]}},
        budget=20,
    ).of(np.arange(2))
    [micro_batch] = step.on(torch.device("meta"))
    assert micro_batch.inputs["model_inputs"]["ids"].device.type == micro_batch.places.device.type == "meta"
    assert micro_batch.inputs["model_inputs"]["row_bounds"] == [0, 4, 7]
    assert step[0].places.tolist() == step[0].indices == [0, 1]


def test_there_is_no_micro_batch_beyond_the_last():
    step = batches([5, 5]).of(np.arange(2))
    with pytest.raises(IndexError):
        step[len(step)]
