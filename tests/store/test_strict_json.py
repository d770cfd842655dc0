import math

import pytest

from finetune.store.strict_json import RepeatedKeyError, from_json, to_json


def test_a_key_that_is_repeated_anywhere_is_refused() -> None:
    with pytest.raises(RepeatedKeyError, match="a key is repeated") as refused:
        from_json('{"a": [{"b": 1, "c": 2, "b": 3}]}')
    assert refused.value.key == "b"
    assert from_json(b'{"a": [{"b": 1}, {"b": 2}]}') == {"a": [{"b": 1}, {"b": 2}]}


def test_floats_round_trip_and_non_finite_ones_are_strings() -> None:
    assert to_json({"a": 0.1 + 0.2, "b": [math.nan, -math.inf, (math.inf,)]}) == (
        '{"a": 0.30000000000000004, "b": ["nan", "-inf", ["inf"]]}'
    )
