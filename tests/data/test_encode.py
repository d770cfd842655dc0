"""Rows are encoded once; the cache speaks of content and settings, and what is read back is what was encoded."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data import encode as encode_module
from finetune.data import shards
from finetune.data.batches import Examples
from finetune.data.encode import Part, encode, encode_part
from finetune.data.example import Example
from finetune.errors import DataError


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Counting:
    """An encoder that makes what the row says: a list of (tokens, supervised) an example; it counts the rows it has seen."""

    def __init__(self):
        self.seen = 0
        self.places = []

    def __call__(self, rows, places):
        self.seen += len(rows)
        self.places += places
        return [
            [
                Example(np.array(tokens, dtype=np.int32), np.array(supervised, dtype=bool), row.get("cut", 0))
                for tokens, supervised in row["examples"]
            ]
            for row in rows
        ]


def where(row):
    return f"data.jsonl:{row + 1}"


def row(*lengths, cut=0):
    return {"examples": [(range(length), [True] * length) for length in lengths], "cut": cut}


def test_numbers_that_a_loss_needs_are_read_back_with_their_example(monkeypatch):
    def encoder(rows, places):
        tokens, supervised = np.arange(2, dtype=np.int32), np.ones(2, dtype=bool)
        return [[Example(tokens, supervised, numbers=(number, 0.5)) for number in row["numbers"]] for row in rows]

    monkeypatch.setattr(encode_module, "SHARD_ROWS", 2)
    rows = [{"numbers": [3.0]}, {"numbers": [0.1, 7]}, {"numbers": [2]}, {"numbers": []}, {"numbers": []}]
    encoded = encode(rows, where, encoder, "content", "numbers")
    assert [encoded[place].numbers for place in range(4)] == [(3.0, 0.5), (0.1, 0.5), (7.0, 0.5), (2.0, 0.5)]
    assert encode([row(3)], where, Counting(), "content", "none")[0].numbers == ()


def test_what_is_read_back_is_what_was_encoded():
    rows = [row(3), row(2, 4), row(5, cut=7)]
    encoded = encode(rows, where, Counting(), "content", "settings")
    assert len(encoded) == 4
    assert encoded.rows.tolist() == [0, 1, 1, 2]
    assert encoded.offsets.tolist() == [0, 3, 5, 9, 14]
    assert encoded.targets.tolist() == [2, 1, 3, 4]
    assert encoded.cut_tokens.tolist() == [0, 0, 0, 7]
    assert encoded.left_out_rows.tolist() == []
    assert [encoded[index].tokens.tolist() for index in range(4)] == [[0, 1, 2], [0, 1], [0, 1, 2, 3], [0, 1, 2, 3, 4]]
    assert encoded[3].cut_tokens == 7
    assert encoded.tokens.dtype == np.int32 and encoded.supervised.dtype == bool


SPANS = st.lists(st.lists(st.booleans(), min_size=1, max_size=6), min_size=1, max_size=3)


@settings(max_examples=30, deadline=None)
@given(st.lists(SPANS, min_size=1, max_size=12), st.integers(0, 10**9))
def test_every_example_with_something_to_learn_is_kept_in_order(spans, key):
    rows = [
        {"examples": [(range(index, index + len(span)), span) for index, span in enumerate(each)]} for each in spans
    ]
    kept = [
        (number, example) for number, each in enumerate(rows) for example in each["examples"] if any(example[1][1:])
    ]
    if not kept:
        return
    encoded = encode(rows, where, Counting(), repr(rows), str(key))
    assert [
        (int(source), example.tokens.tolist(), example.supervised.tolist())
        for source, example in zip(encoded.rows, encoded, strict=True)
    ] == [(number, list(tokens), span) for number, (tokens, span) in kept]
    assert encoded.targets.tolist() == [sum(span[1:]) for _, (_, span) in kept]
    assert encoded.left_out_rows.tolist() == sorted(set(range(len(rows))) - {number for number, _ in kept})


def test_the_same_content_and_settings_are_encoded_once():
    encoder = Counting()
    first = encode([row(3), row(2)], where, encoder, "content", "settings")
    second = encode([], where, encoder, "content", "settings")  # not asked: the cache has it
    assert encoder.seen == 2
    assert np.array_equal(first.tokens, second.tokens)


def test_other_content_or_other_settings_are_encoded_anew(monkeypatch):
    encoder = Counting()
    for key in (("content", "settings"), ("other content", "settings"), ("content", "other settings"), ("content",)):
        encode([row(3)], where, encoder, *key)
    monkeypatch.setattr(shards, "VERSION", 0)
    encode([row(3)], where, encoder, "content", "settings")
    assert encoder.seen == 5


def test_the_arrays_are_mapped_not_read(own_cache):
    encoded = encode([row(3)], where, Counting(), "content")
    for name in ("tokens", "supervised", "offsets", "rows", "targets", "cut_tokens", "left_out_rows"):
        array = getattr(encoded, name)
        assert isinstance(array.base, np.memmap) and not array.flags.writeable
    assert np.shares_memory(encoded[0].tokens, encoded.tokens)
    [entry] = (own_cache / "encoded").iterdir()
    assert all(file.suffix in (".npy", ".json") for file in entry.iterdir())


def test_rows_are_given_to_the_encoder_a_part_at_a_time_with_their_places(monkeypatch):
    monkeypatch.setattr(shards, "ROWS_AT_ONCE", 4)
    encoder = Counting()
    encoded = encode([row(2 + number) for number in range(10)], where, encoder, "content")
    assert encoder.places == [where(number) for number in range(10)]
    assert np.diff(encoded.offsets).tolist() == list(range(2, 12))
    assert encoded.rows.tolist() == list(range(10))


def test_a_row_with_nothing_to_learn_within_its_length_is_left_out_and_counted():
    only_first = {"examples": [(range(3), [True, False, False])]}  # the first token of an example is never predicted
    encoded = encode([row(3), only_first, row(2)], where, Counting(), "content")
    assert encoded.left_out_rows.tolist() == [1]
    assert encoded.rows.tolist() == [0, 2]


def test_rows_without_anything_to_learn_are_refused_and_leave_no_entry(own_cache):
    with pytest.raises(DataError) as caught:
        encode([{"examples": [(range(3), [False] * 3)]}], where, Counting(), "content")
    assert str(caught.value) == (
        "data.jsonl:1: no row has a supervised token within task.max_length\n"
        "hint: raise task.max_length, or look at the rows"
    )
    assert list((own_cache / "encoded").iterdir()) == []


class Refusing(Counting):
    def __call__(self, rows, places):
        for each, place in zip(rows, places, strict=True):
            if each.get("bad"):
                raise DataError(f"is {each['bad']}", where=place, hint="remove the row")
        return super().__call__(rows, places)


class Unreadable(list):
    def __getitem__(self, index):
        if super().__getitem__(index) is None:
            raise DataError("is torn", where=where(index))
        return super().__getitem__(index)


def test_all_bad_rows_are_told_at_once_whether_reading_or_encoding_refuses_them(monkeypatch):
    monkeypatch.setattr(shards, "ROWS_AT_ONCE", 3)
    rows = Unreadable([row(3), {"bad": "empty"}, None, row(2), row(2), {"bad": "long"}, {"bad": "empty"}, row(1)])
    with pytest.raises(DataError) as caught:
        encode(rows, where, Refusing(), "content")
    assert str(caught.value) == (
        "data.jsonl:2: is empty\n  also data.jsonl:7\n"
        "data.jsonl:3: is torn\n"
        "data.jsonl:6: is long\n"
        "4 of 8 rows are refused\nhint: remove the row"
    )


def test_bad_rows_of_the_next_shards_are_told_too(monkeypatch):
    monkeypatch.setattr(encode_module, "SHARD_ROWS", 2)
    rows = [{"bad": "empty"} if number in (3, 6, 11) else row(3) for number in range(12)]
    with pytest.raises(DataError) as caught:
        encode(rows, where, Refusing(), "content")
    assert str(caught.value).splitlines()[:3] == [
        "data.jsonl:4: is empty",
        "  also data.jsonl:7",
        "2 of 10 rows are refused",
    ]


def test_an_error_that_no_single_row_makes_stays_as_it_is():
    def encoder(rows, places):
        if len(rows) > 1:
            raise DataError("rows do not go together", where=places[0])
        return [[]]

    with pytest.raises(DataError, match="rows do not go together"):
        encode([row(3), row(3)], where, encoder, "content")


def test_lost_tokens_are_counted_for_rows_that_are_kept_and_left_out():
    def encoder(rows, places):
        tokens = np.arange(3, dtype=np.int32)
        return [[Example(tokens, np.array([False, *row["kept"]]), 2, row["lost"])] for row in rows]

    rows = [{"kept": kept, "lost": lost} for kept, lost in (((True, True), 0), ((True, False), 4), ((False, False), 9))]
    encoded = encode(rows, where, encoder, "content")
    assert encoded.lost.tolist() == [[1, 4], [2, 9]] and encoded.left_out_rows.tolist() == [2]
    assert Examples([(encoded, np.arange(2), 0)]).lost() == (2, 13, 16)


ROWS = [row(2 + number % 5, 3) for number in range(29)]


def task(number, of, encoder=None, rows=ROWS):
    return encode_part(rows, where, encoder or Counting(), "tasks", part=Part(number, of))


def entry(cache):
    [found] = [path for path in (cache / "encoded").iterdir() if not path.name.endswith(".building")]
    return {file.name: file.read_bytes() for file in found.iterdir()}


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(encode_module, "SHARD_ROWS", 4)


@pytest.mark.parametrize("tasks", [(1, 2, 3), (3, 1, 2), (2, 2, 3, 1)])
def test_tasks_on_a_shared_file_system_make_the_bytes_of_one_process(
    own_cache, tmp_path, monkeypatch, small_shards, tasks
):
    *before, last = [task(number, 3) for number in tasks]
    assert before == [None] * len(before) and len(last) == 2 * len(ROWS)
    together = entry(own_cache)
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "alone"))
    encode(ROWS, where, Counting(), "tasks")
    assert entry(tmp_path / "alone") == together
    assert len(list((own_cache / "encoded").iterdir())) == 1, "the shards are removed once they are joined"


def test_a_task_goes_on_after_a_kill_and_training_makes_what_is_missing(own_cache, small_shards):
    class Killed(Counting):
        def __call__(self, rows, places):
            if self.seen == 8:
                raise KeyboardInterrupt
            return super().__call__(rows, places)

    with pytest.raises(KeyboardInterrupt):
        task(1, 2, Killed())
    again, training = Counting(), Counting()
    assert task(1, 2, again) is None and again.seen == 16 - 8
    assert len(encode(ROWS, where, training, "tasks")) == 2 * len(ROWS)
    assert training.seen == 29 - 16 and len(list((own_cache / "encoded").iterdir())) == 1
    done = Counting()
    assert len(task(2, 2, done)) == 2 * len(ROWS) and done.seen == 0


def test_a_damaged_shard_of_another_task_is_made_again(own_cache, small_shards):
    task(1, 2)
    [shard] = own_cache.glob("encoded/*.shared.building/rows-4-8")
    (shard / "tokens.raw").write_bytes(b"other")
    training = Counting()
    encode(ROWS, where, training, "tasks")
    assert training.seen == 29 - 16 + 4


def test_more_tasks_than_shards_leave_some_without_work(small_shards):
    results = [task(number, 20) for number in range(1, 21)]
    assert [result for result in results if result is not None] == results[-1:]


def test_two_tasks_with_the_same_number_do_not_harm_each_other(own_cache, small_shards):
    class Overtaken(Counting):
        """While it encodes, another task with the same number makes all of its shards."""

        def __call__(self, rows, places):
            if not self.seen:
                task(1, 2)
            return super().__call__(rows, places)

    assert task(1, 2, Overtaken()) is None
    assert len(task(2, 2)) == 2 * len(ROWS)


def test_a_bad_row_of_a_task_is_told_and_leaves_the_shards_of_others(own_cache, small_shards):
    def refuses(rows, places):
        raise DataError("is bad", where=places[0], hint="correct it")

    task(1, 2)
    with pytest.raises(DataError, match="is bad"):
        task(2, 2, refuses)
    assert len(list(own_cache.glob("encoded/*.shared.building/rows-*[0-9]"))) == 4


def test_a_task_whose_work_others_have_joined_meanwhile_takes_theirs(own_cache, small_shards):
    class Overtaken(Counting):
        def __call__(self, rows, places):
            if not self.seen:
                assert task(1, 2) is None and task(2, 2) is not None
            return super().__call__(rows, places)

    assert len(task(1, 2, Overtaken())) == 2 * len(ROWS)
    assert len(list((own_cache / "encoded").iterdir())) == 1
