"""How the tensors of a checkpoint are divided among files: by shapes alone, so any number of ranks makes the same ones."""

from itertools import chain

import pytest

from finetune.store.checkpoints import tensor_files
from finetune.store.checkpoints.tensor_files import OPTIMIZER, WHOLE, divided, is_for_resume, kind_of, of_kind
from finetune.store.tensors import Tensor, in_order


def tensors(*sizes: int) -> list[Tensor]:
    """Of so many bytes, without their data: a rank that has no rows of a tensor has none either."""
    return [Tensor(f"{number}.weight", "F32", (size // 4,), b"") for number, size in enumerate(sizes)]


def names(files: dict[str, list[Tensor]]) -> dict[str, list[str]]:
    return {name: [tensor.name for tensor in each] for name, each in files.items()}


def test_a_small_file_is_not_divided() -> None:
    made = tensors(400, 800, 4)
    assert divided(WHOLE, made) == {WHOLE: made}
    assert divided(OPTIMIZER, []) == {OPTIMIZER: []}


def test_a_large_one_is_divided_between_tensors(monkeypatch) -> None:
    monkeypatch.setattr(tensor_files, "FILE_BYTES", 1000)
    assert names(divided(WHOLE, tensors(400, 600, 4, 4000, 500))) == {
        "model-00001-of-00004.safetensors": ["0.weight", "1.weight"],
        "model-00002-of-00004.safetensors": ["2.weight"],
        "model-00003-of-00004.safetensors": ["3.weight"],
        "model-00004-of-00004.safetensors": ["4.weight"],
    }


def test_it_is_divided_in_the_order_of_its_bytes_whatever_order_a_rank_has(monkeypatch) -> None:
    monkeypatch.setattr(tensor_files, "FILE_BYTES", 1000)
    made = tensors(*range(4, 800, 44))
    files = divided(WHOLE, made)
    assert list(chain(*files.values())) == in_order(made)
    assert names(divided(WHOLE, made[::-1])) == names(files)


@pytest.mark.parametrize("kind", [WHOLE, OPTIMIZER, "model-frozen.safetensors", "ema.safetensors"])
def test_files_are_found_by_their_kind(kind, monkeypatch) -> None:
    monkeypatch.setattr(tensor_files, "FILE_BYTES", 4)
    made = divided(kind, tensors(*[4] * 11))
    assert {kind_of(name) for name in made} == {kind}
    assert of_kind([*reversed(made), "other.safetensors", "config.json"], kind) == list(made)
    assert {is_for_resume(name) for name in made} == {kind == OPTIMIZER}


def test_other_names_are_their_own_kind() -> None:
    for name in ("model.safetensors", "model-trained.safetensors", "model.safetensors.index.json", "state.json"):
        assert kind_of(name) == name
