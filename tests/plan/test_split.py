"""Held-out rows are a function of content and seed: nothing else of a row, of its file or of its company counts."""

import numpy as np
import pytest

from finetune.plan import split as splits
from finetune.plan.split import Split, content_of

CONTENTS = np.array([content_of(f"row {number}") for number in range(5000)], dtype=np.uint64)


def held_out(split, contents=CONTENTS):
    return set(contents[split.holds_out(contents)].tolist())


def test_a_seed_decides_and_every_seed_otherwise():
    draws = [held_out(splits.draw(50, seed, [CONTENTS])) for seed in (0, 0, 1, 2)]
    assert draws[0] == draws[1] and len(draws[0]) == 50
    assert all(len(one & two) < 10 for one, two in ((draws[0], draws[2]), (draws[0], draws[3]), (draws[2], draws[3])))


def test_order_and_sources_do_not_count():
    shuffled = np.random.default_rng(0).permutation(CONTENTS)
    assert splits.draw(50, 3, [CONTENTS]) == splits.draw(50, 3, [shuffled[:7], shuffled[7:]])


def test_a_share_holds_out_the_same_rows_whatever_others_there_are():
    split = splits.draw("5%", 0, [])
    assert 200 < len(held_out(split)) < 300
    assert held_out(split) & set(CONTENTS[:100].tolist()) == held_out(split, CONTENTS[:100])
    assert held_out(split) < held_out(splits.draw("7.5%", 0, []))
    assert len(held_out(splits.draw("100%", 0, []))) == 5000


def test_rows_that_are_added_hold_out_none_that_were_trained_on():
    fewer, more = (splits.draw(50, 0, [contents]) for contents in (CONTENTS[:1000], CONTENTS))
    known = set(CONTENTS[:1000].tolist())
    assert held_out(more) & known < held_out(fewer, CONTENTS[:1000])
    assert more.is_within(fewer) and not fewer.is_within(more)


def test_a_count_is_one_of_different_rows():
    many = np.concatenate([np.repeat(CONTENTS[:3], 1000), CONTENTS])
    split = splits.draw(50, 0, [many])
    assert len(held_out(split, many)) == 50
    rows = splits.held_out_rows(split, [many[:100], many[100:]])
    assert set(many[rows].tolist()) == held_out(split, many) and rows.tolist() == sorted(rows)
    assert not set(many[np.setdiff1d(np.arange(len(many)), rows)].tolist()) & held_out(split, many)


def test_pieces_do_not_count(monkeypatch):
    split = splits.draw(50, 0, [CONTENTS])
    rows = splits.held_out_rows(split, [CONTENTS]).tolist()
    monkeypatch.setattr(splits, "PIECE", 7)
    assert splits.draw(50, 0, [CONTENTS]) == split
    assert splits.held_out_rows(split, [CONTENTS]).tolist() == rows


def test_a_list_of_rows_holds_out_those_and_is_within_nothing_but_itself():
    listed = Split(seed=0, contents=splits.texts(CONTENTS[[5, 2, 5]]))
    assert held_out(listed) == set(CONTENTS[[2, 5]].tolist())
    assert listed.is_within(listed)
    assert not listed.is_within(splits.draw("50%", 0, [])) and not splits.draw(1, 0, [CONTENTS]).is_within(listed)
    assert not listed.is_within(None)


@pytest.mark.parametrize(("one", "two"), [({"a": 1, "b": None}, {"b": None, "a": 1}), ("é", "é")])
def test_equal_values_have_one_content(one, two):
    assert content_of(one) == content_of(two) != content_of("e")


def test_a_digest_stands_for_a_set_of_rows():
    assert splits.digest(CONTENTS) == splits.digest(CONTENTS[::-1]) != splits.digest(CONTENTS[1:])
