"""A base of which each rank reads its own rows has the bits, types, ties and buffers that transformers loads."""

import os
import shutil

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig

from finetune.errors import BaseError
from finetune.model import shards
from finetune.model.base import Place, empty_model, load_as_stored, load_model, unread
from finetune.model.base.handed_on import ONE_BY_ONE
from finetune.model.tiny import model_like

CPU = torch.device("cpu")
# tied; experts stored one by one; a persistent buffer; experts in one tensor; frequencies by length; a model that also reads images
FAMILIES = {
    "gemma2": {},
    "qwen3_moe": {},
    "deepseek_v3": {"num_hidden_layers": 2, "first_k_dense_replace": 1},
    "llama4_text": {},
    "llama": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
    "gemma3": {},
}


@pytest.fixture(scope="module", params=FAMILIES)
def base(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    config = AutoConfig.for_model(request.param, **FAMILIES[request.param])
    model_like(config, 64).save_pretrained(directory, max_shard_size="100KB")
    return directory


def read(directory, dtype=torch.float32, **settings):
    found = unread(directory, dtype, None, Place(CPU), **settings)
    found.fill(found.model)
    return found.model


def assert_same(found, expected):
    for tensors in ("named_parameters", "named_buffers"):
        theirs = dict(getattr(expected, tensors)())
        ours = dict(getattr(found, tensors)())  # a tied tensor is named once
        assert list(ours) == list(theirs)
        assert {name: (each.dtype, each.device, each.requires_grad) for name, each in ours.items()} == {
            name: (each.dtype, each.device, each.requires_grad) for name, each in theirs.items()
        }
        assert all(torch.equal(each, theirs[name]) for name, each in ours.items())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_read_by_rows_is_what_transformers_loads(base, dtype):
    found, expected = read(base, dtype), load_model(base, dtype)
    assert_same(found, expected)
    tokens = torch.arange(2, 10)[None]
    with torch.no_grad():
        logits, theirs = (each(input_ids=tokens, use_cache=False).logits for each in (found, expected))
    assert torch.equal(logits, theirs)
    assert ONE_BY_ONE not in os.environ


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "ranks"), [(0, 3), (1, 4), (4, 5)])  # torch keeps the rows of a process by its mesh
def test_each_rank_has_its_rows_and_no_others(base, rank, ranks):
    expected = dict(load_model(base).named_parameters())
    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    try:
        found = unread(base, torch.float32, None, Place(CPU))
        fully_shard(found.model, mesh=init_device_mesh("cpu", (ranks,)))
        found.fill(found.model)
        for name, parameter in found.model.named_parameters():
            rows, own = shards.rows_of(parameter), shards.local(parameter)
            assert torch.equal(own, expected[name][rows.first : rows.end])
            assert own.untyped_storage().nbytes() == own.nbytes  # nothing else is kept
    finally:
        dist.destroy_process_group()


@pytest.fixture
def stored_twice(tiny_base, tmp_path):
    """A function that gives a tied base with its head in the files as well."""

    def make(change):
        shutil.copytree(tiny_base, tmp_path / "base")
        path = tmp_path / "base" / "model.safetensors"
        tensors = load_file(path)
        save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + change}, path, {"format": "pt"})
        return tmp_path / "base"

    return make


@pytest.mark.parametrize("change", [0.0, 1e-3])
def test_a_head_that_is_stored_beside_its_embeddings_is_tied_if_it_is_equal(stored_twice, change):
    """transformers ties by the numbers, which it cannot compare before they are read."""
    directory = stored_twice(change)
    found, expected = read(directory), load_model(directory)
    assert_same(found, expected)
    assert found.all_tied_weights_keys == expected.all_tied_weights_keys
    assert (
        bool(found.all_tied_weights_keys) == (found.lm_head.weight is found.model.embed_tokens.weight) == (not change)
    )


def test_what_a_base_keeps_in_fp32_beside_bf16_stays_so(tiny_base, tmp_path):
    shutil.copytree(tiny_base, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "model.safetensors"
    halved = {name: each if "norm" in name else each.bfloat16() for name, each in load_file(path).items()}
    save_file(halved, path, {"format": "pt"})
    found = read(tmp_path, torch.bfloat16, keeps_fp32=True)
    assert_same(found, load_as_stored(tmp_path, torch.bfloat16))
    assert {each.dtype for each in found.parameters()} == {torch.float32, torch.bfloat16}


def test_tensors_that_are_to_be_in_bf16_are_rounded_once(tiny_base):
    names = frozenset({"model.layers.0.mlp.up_proj.weight"})
    found = unread(tiny_base, torch.float32, None, Place(CPU, names))
    found.fill(found.model)
    expected = dict(load_model(tiny_base).named_parameters())
    for name, each in found.model.named_parameters():
        wanted = expected[name].bfloat16() if name in names else expected[name]
        assert each.dtype == wanted.dtype and torch.equal(each, wanted)


def test_a_file_that_is_cut_after_it_was_looked_at_is_named(tiny_base, tmp_path):
    """A mapped file would end the process."""
    shutil.copytree(tiny_base, tmp_path, dirs_exist_ok=True)
    found, path = unread(tmp_path, torch.float32, None, Place(CPU)), tmp_path / "model.safetensors"
    os.truncate(path, path.stat().st_size - 4)
    with pytest.raises(BaseError, match=r"model\.safetensors is damaged: it ends before its last tensor"):
        found.fill(found.model)


def test_a_file_that_lacks_a_weight_or_has_another_shape_is_refused_unread(tiny_base, tmp_path):
    shutil.copytree(tiny_base, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    for changed in ({"model.norm.weight": tensors["model.norm.weight"][:-1].clone()}, {}):
        save_file(
            {name: each for name, each in tensors.items() if "norm" not in name} | changed, path, {"format": "pt"}
        )
        with pytest.raises(BaseError, match="lacks weights of its own config"):
            unread(tmp_path, torch.float32, None, Place(CPU))


def test_files_of_other_numbers_are_not_read_by_rows(tiny_base, monkeypatch):
    """What transformers dequantizes while it reads, like MXFP4."""
    config = empty_model(tiny_base).config
    config.quantization_config = {"quant_method": "mxfp4"}
    monkeypatch.setattr("finetune.model.base.by_rows.load_config", lambda _: config)
    assert unread(tiny_base, torch.float32, None, Place(CPU)) is None
