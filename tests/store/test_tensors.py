"""Our safetensors files are everybody's, and a header that breaks a rule is refused."""

import io
import json
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from finetune.errors import CheckpointError
from finetune.store import tensors
from finetune.store.tensors import Tensor

NUMPY = {"F64": "<f8", "F32": "<f4", "I64": "<i8", "I32": "<i4", "F16": "<f2", "U8": "<u1"}


def tensor(name, array):
    dtype = next(name for name, code in NUMPY.items() if np.dtype(code) == array.dtype)
    return Tensor(name, dtype, array.shape, memoryview(np.ascontiguousarray(array)))


def header_of(entries):
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


arrays = st.builds(
    lambda code, shape, seed: np.random.default_rng(seed).integers(0, 100, shape).astype(code),
    st.sampled_from(sorted(NUMPY.values())),
    st.lists(st.integers(0, 5), max_size=3),
    st.integers(0, 9),
)


@settings(deadline=None, max_examples=50)
@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8), arrays, max_size=5))
def test_safetensors_loads_what_we_write(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("tensors") / "model.safetensors"
    with path.open("wb") as file:
        records = tensors.write(file, [tensor(*item) for item in values.items()], {"format": "pt"})
    with safe_open(path, "numpy") as loaded:
        assert loaded.metadata() == {"format": "pt"}
        assert set(loaded.keys()) == set(values)
        for name, value in values.items():
            assert np.array_equal(loaded.get_tensor(name), value)
    places = tensors.read_header(path)
    assert {item.name: (item.dtype, item.shape) for item in records} == {
        name: place[:2] for name, place in places.items()
    }
    assert all(place.start % tensors.ITEM_BYTES[place.dtype] == 0 for place in places.values()), "tensors are aligned"
    assert tensors.damaged(path, path.stat().st_size, records) == []


def test_data_is_streamed_in_pieces_of_at_most_a_mebibyte():
    sizes = []

    class File(io.BytesIO):
        def write(self, data):
            sizes.append(len(data))
            return super().write(data)

    tensors.write(File(), [tensor("a", np.zeros(3 << 20, "<u1"))], {})
    assert max(sizes) == 1 << 20
    assert sum(sizes) > 3 << 20


def test_a_tensor_whose_bytes_do_not_fill_its_shape_is_a_bug():
    with pytest.raises(ValueError, match="a: 3 bytes are not F32 of shape"):
        tensors.write(io.BytesIO(), [Tensor("a", "F32", (1,), b"abc")], {})


def test_two_tensors_of_one_name_are_a_bug():
    one = Tensor("a", "U8", (1,), b"x")
    with pytest.raises(ValueError, match="two tensors have this name"):
        tensors.write(io.BytesIO(), [one, one], {})


GOOD = {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a header of 0 bytes does not fit a file of 0"),
        (struct.pack("<Q", 1 << 40), "does not fit"),
        (struct.pack("<Q", 100_000_001) + b"{}", "does not fit"),
        (header_of(b"{"), "not valid JSON"),
        (header_of(b"\xff{}"), "not valid JSON"),
        (header_of(b"[" * 100_000), "not valid JSON"),
        (header_of(b"[]"), "not a JSON object"),
        (header_of(b"  {}"), "not a JSON object"),
        (header_of(b'{"a": {}, "a": {}}'), "a key is repeated"),
        (header_of({"__metadata__": {"a": 1}}), "`__metadata__` is not a map of strings"),
        (header_of({"a": 1}), "does not have exactly dtype, shape and data_offsets"),
        (header_of({"a": GOOD | {"more": 1}}) + b"xx", "does not have exactly"),
        (header_of({"a": GOOD | {"dtype": "F7"}}) + b"xx", "unknown dtype F7"),
        (header_of({"a": GOOD | {"shape": [-2]}}) + b"xx", "has the shape"),
        (header_of({"a": GOOD | {"shape": [True, 2]}}) + b"xx", "has the shape"),
        (header_of({"a": GOOD | {"data_offsets": [0, 2, 3]}}) + b"xx", "the offsets"),
        (header_of({"a": GOOD | {"shape": [3]}}) + b"xx", "takes 2 bytes, which is not U8 of shape [3]"),
        (header_of({"a": GOOD | {"data_offsets": [1, 3]}}) + b"xxx", "begins at byte"),
        (header_of({"a": GOOD, "b": GOOD | {"data_offsets": [1, 3]}}) + b"xxx", "`b` begins at byte"),
        (header_of({"a": GOOD}) + b"x", "the tensors end at byte"),
        (header_of({"a": GOOD}) + b"xxx", "the tensors end at byte"),
    ],
)
def test_a_header_that_breaks_the_format_is_refused(tmp_path, content, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        tensors.read_header(path)
    assert message in caught.value.message
    assert caught.value.where == str(path)
