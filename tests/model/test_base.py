"""A base is pinned to its content, its code is never run, its pickles are never read, and what it lacks is named."""

import ctypes
import json
import mmap
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.errors import BaseError, CheckpointError
from finetune.model.base import (
    check_generation_config,
    check_weight_files,
    directory,
    empty_model,
    load_config,
    load_model,
    load_tokenizer,
    pin,
    read_ahead,
    stop_tokens,
)
from finetune.model.base.files import digest
from finetune.recipe.schema import Base
from finetune.training.opened import open_model


@pytest.fixture
def copied(tiny_base, tmp_path):
    """A copy of the tiny base that a test may spoil."""
    return shutil.copytree(tiny_base, tmp_path / "base")


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed Python package that would end the process if it were imported."""
    folder = tmp_path / "site" / "carrier"
    (folder / "models").mkdir(parents=True)
    for file in (folder / "__init__.py", folder / "models" / "__init__.py"):
        file.write_text("raise SystemExit('a carrier must not be imported')\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    return folder


def edit(path, **changes):
    record = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in (record | changes).items() if value is not None}))


def refusal(function, *arguments):
    with pytest.raises((BaseError, CheckpointError)) as caught:
        function(*arguments)
    return str(caught.value)


def test_the_model_loads_whole_in_fp32_and_in_eval_mode_without_a_cache(tiny_base):
    model = load_model(tiny_base)
    assert not model.training and model.dtype == torch.float32 and not model.config.use_cache
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert load_model(tiny_base, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_an_empty_model_counts_like_the_whole_one_and_takes_no_memory(tiny_base):
    empty, whole = empty_model(tiny_base), load_model(tiny_base)
    shapes = [
        {name: tuple(parameter.shape) for name, parameter in model.named_parameters()} for model in (empty, whole)
    ]
    assert shapes[0] == shapes[1]
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert sum(parameter.numel() for parameter in empty.parameters()) == sum(
        parameter.numel() for parameter in whole.parameters()
    )


def test_a_config_without_a_causal_lm_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", "architectures": ["CLIPModel"]}))
    assert refusal(load_config, tmp_path) == (
        f"{tmp_path.name}: is not a language model: it is of type `clip`, which has no causal LM in transformers\n"
        "hint: choose a base that generates text"
    )


def test_a_masked_language_model_is_refused(tmp_path):
    from transformers import BertConfig

    BertConfig(architectures=["BertForMaskedLM"]).save_pretrained(tmp_path)
    assert refusal(load_config, tmp_path) == (
        f"{tmp_path.name}: is not a language model: it is BertForMaskedLM\nhint: choose a base that generates text"
    )


@pytest.mark.parametrize("read", [load_config, load_model, empty_model])
def test_code_of_a_checkpoint_is_refused_and_never_run(copied, read):
    (copied / "modeling.py").write_text("raise SystemExit('code of a checkpoint was run')\n")
    auto_map = {"AutoConfig": "modeling.Config", "AutoModelForCausalLM": "modeling.Model"}
    edit(copied / "config.json", auto_map=auto_map)
    assert refusal(read, copied) == (
        "base: needs its own code (`auto_map` in config.json), which is never run\nhint: choose a base that transformers knows"
    )


def test_code_of_a_tokenizer_is_never_run(copied):
    (copied / "tokenizing.py").write_text("raise SystemExit('code of a checkpoint was run')\n")
    edit(copied / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "tokenizing.Fast"]})
    try:
        tokenizer = load_tokenizer(copied)
    except BaseError as error:
        assert "auto_map" in str(error)
    else:
        assert type(tokenizer).__module__.startswith("transformers.")


def test_a_base_of_pickles_alone_is_refused_unread(copied):
    (copied / "model.safetensors").unlink()
    (copied / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    assert refusal(load_model, copied) == (
        "base: has no safetensors weights\nhint: convert it: load it in transformers once and call save_pretrained"
    )


def test_a_base_that_lacks_a_weight_is_refused(copied):
    from safetensors.torch import load_file, save_file

    tensors = load_file(copied / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, copied / "model.safetensors", {"format": "pt"})
    assert refusal(load_model, copied) == (
        "base: lacks weights of its own config (missing keys): model.layers.1.mlp.up_proj.weight"
    )


def test_a_directory_without_a_config_is_refused(tmp_path):
    assert refusal(load_config, tmp_path) == (
        f"{tmp_path.name}: has no config.json, so it is not a checkpoint\nhint: name a transformers checkpoint"
    )


def test_a_damaged_config_is_refused(copied):
    (copied / "config.json").write_text("{")
    assert refusal(load_config, copied).startswith("base: its config.json is damaged: ")


def halve(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def reshape_a_weight(file):
    from safetensors.torch import load_file, save_file

    save_file(load_file(file) | {"model.norm.weight": torch.zeros(7)}, file, {"format": "pt"})


def open_whole(path):
    load_model(path)
    stop_tokens(path, load_tokenizer(path), ())


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("config.json", lambda file: file.write_text("[]")),
        ("config.json", lambda file: edit(file, hidden_size="wide")),
        ("model.safetensors", halve),
        ("model.safetensors", reshape_a_weight),
        ("model.safetensors", lambda file: file.rename(file.with_name("model-00001-of-00002.safetensors"))),
        ("tokenizer.json", lambda file: file.unlink()),
        ("tokenizer.json", halve),
        ("generation_config.json", halve),
    ],
)
def test_a_damaged_base_is_refused(copied, name, damage):
    damage(copied / name)
    assert refusal(open_whole, copied).startswith("base: ")


def test_a_base_that_is_not_there_is_refused(tmp_path):
    missing = str(tmp_path / "missing")
    assert missing in refusal(pin, Base(checkpoint=missing))


def test_a_revision_of_a_local_base_is_refused(tiny_base):
    assert refusal(pin, Base(checkpoint=str(tiny_base), revision="main")) == (
        f"{tiny_base}: `base.revision` goes with a Hub checkpoint only\nhint: remove it"
    )


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"])
def test_the_digest_changes_with_each_file_and_a_changed_base_is_refused(tiny_base, copied, name):
    base = Base(checkpoint=str(copied))
    pinned = pin(base)
    assert pinned.kind == "directory" and pinned.digest.startswith("blake3:")
    assert pinned == pin(Base(checkpoint=str(tiny_base)))  # the same content elsewhere
    assert directory(base, pinned) == copied
    with open(copied / name, "ab") as file:
        file.write(b" ")
    assert pin(base).digest != pinned.digest
    assert refusal(directory, base, pinned) == (
        f"{copied}: is not what it was when the run was planned\nhint: restore it, or start a new run"
    )


def test_the_digest_does_not_change_with_a_file_that_is_no_part_of_the_checkpoint(copied):
    before = pin(Base(checkpoint=str(copied)))
    (copied / "README.md").write_text("about")
    (copied / "pytorch_model.bin").write_bytes(b"unread")
    for name in (
        "manifest.json",
        "state.json",
        "trainer_state.json",
        "optimizer.safetensors",
    ):  # retention takes them away
        (copied / name).write_text("how its training went on")
    assert digest(copied) == before.digest


def test_stop_tokens_are_those_of_tokenizer_and_generation_config(copied):
    tokenizer = load_tokenizer(copied)
    end = tokenizer.eos_token_id
    edit(copied / "generation_config.json", eos_token_id=[end, 0])
    assert stop_tokens(copied, tokenizer, ()) == {end, 0}
    edit(copied / "generation_config.json", eos_token_id=7)
    assert stop_tokens(copied, tokenizer, ()) == {end, 7}
    edit(copied / "generation_config.json", eos_token_id=None)
    assert stop_tokens(copied, tokenizer, ()) == {end}
    (copied / "generation_config.json").unlink()
    assert stop_tokens(copied, tokenizer, ()) == {end}
    tokenizer.eos_token = None
    assert stop_tokens(copied, tokenizer, ()) == frozenset()


def test_a_package_that_is_not_installed_is_named():
    assert refusal(pin, Base(checkpoint="package:no_such_carrier/model.gguf")) == (
        "package:no_such_carrier/model.gguf: no installed package is called `no_such_carrier`\nhint: install it with pip"
    )


@pytest.mark.parametrize("name", ["carrier", "carrier.models"])
def test_a_package_without_the_file_says_what_it_has_and_is_not_imported(package, name):
    text = f"package:{name}/model.gguf"
    assert (
        refusal(pin, Base(checkpoint=text)) == f"{text}: the package has no file model.gguf\nhint: it has no GGUF file"
    )
    for file in ("b.gguf", "a.gguf"):
        (package.joinpath(*name.split(".")[1:]) / file).write_bytes(b"")
    assert (
        refusal(pin, Base(checkpoint=text))
        == f"{text}: the package has no file model.gguf\nhint: it has a.gguf, b.gguf"
    )


def test_a_module_that_is_no_package_carries_nothing():
    assert "no installed package is called `json_`" in refusal(pin, Base(checkpoint="package:json_/model.gguf"))
    assert "no installed package is called `this`" in refusal(pin, Base(checkpoint="package:this/model.gguf"))


def test_the_hub_is_named_when_it_cannot_be_reached():
    message = refusal(pin, Base(checkpoint="owner/name"))
    assert message.startswith("owner/name: the Hub cannot be reached: ")
    assert message.endswith("\nhint: `finetune fetch` a recipe where there is a network")


def test_a_model_without_a_tokenizer_says_what_is_missing_and_where(copied):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copied / name).unlink()
    assert refusal(load_tokenizer, copied) == (
        "base: has no tokenizer\n"
        f"hint: copy tokenizer.json and tokenizer_config.json of the model that it was trained from into {copied}"
    )


def save_state(directory, model):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    accelerator.save_state(str(directory))


def distributed(directory, model):
    import torch.distributed.checkpoint

    torch.distributed.checkpoint.save(model.state_dict(), checkpoint_id=directory)


def pickled(directory, model):
    directory.mkdir()
    torch.save(model.state_dict(), directory / "pytorch_model.bin")
    torch.save({}, directory / "optimizer.pt")


def deepspeed(directory, model):
    (directory / "global_step4").mkdir(parents=True)
    (directory / "zero_to_fp32.py").write_text("")


def output(directory, model):
    for step in (4, 12, 8):
        model.save_pretrained(directory / f"checkpoint-{step}")


@pytest.mark.parametrize(
    ("write", "message", "hint"),
    [
        (
            save_state,
            "is a state of accelerate (`save_state`), without config and tokenizer",
            "copy the model's config",
        ),
        (distributed, "is a sharded checkpoint (FSDP, torch DCP)", "merge it with `accelerate merge-weights`, and put"),
        (deepspeed, "is a DeepSpeed checkpoint", "merge it with its zero_to_fp32.py and --safe_serialization"),
        (pickled, "has only pickles, which are never read: optimizer.pt, pytorch_model.bin", "load it in the program"),
        (output, "holds no model itself", "name one inside it, like {}/checkpoint-12"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_directories_of_other_programs_are_refused_by_what_they_are(write, message, hint, tiny_base, tmp_path):
    write(tmp_path / "theirs", load_model(tiny_base))
    expected = f"{tmp_path / 'theirs'}: {message}\nhint: {hint.format(tmp_path / 'theirs')}"
    assert refusal(pin, Base(checkpoint=str(tmp_path / "theirs"))).startswith(expected)
    assert refusal(open_model, str(tmp_path / "theirs")).startswith(expected)


def test_what_accelerate_saved_is_a_base_once_its_config_and_tokenizer_are_beside_it(tiny_base, tmp_path):
    save_state(tmp_path / "theirs", load_model(tiny_base))
    for file in [*tiny_base.glob("*.json"), tiny_base / "chat_template.jinja"]:
        shutil.copy(file, tmp_path / "theirs")
    base = Base(checkpoint=str(tmp_path / "theirs"))
    whole = load_model(directory(base, pin(base)))
    assert torch.equal(whole.lm_head.weight, load_model(tiny_base).lm_head.weight)


def test_a_sharded_directory_with_a_config_is_refused_when_it_is_planned(copied):
    (copied / "model.safetensors").unlink()
    (copied / "pytorch_model_fsdp_0").mkdir()
    (copied / "pytorch_model_fsdp_0/__0_0.distcp").write_bytes(b"unread")
    base = Base(checkpoint=str(copied))
    assert "is a sharded checkpoint (FSDP, torch DCP)" in refusal(directory, base, pin(base), False)


def test_weights_are_read_ahead_of_their_use(tmp_path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(32 << 20))
    with weights.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    read_ahead(tmp_path)
    wanted = 0.9 * weights.stat().st_size / mmap.PAGESIZE  # the system may take some back
    deadline = time.monotonic() + 10
    while pages_in_memory(weights) < wanted and time.monotonic() < deadline:  # the kernel answers before the disk has
        time.sleep(0.01)
    assert pages_in_memory(weights) >= wanted


def pages_in_memory(file: Path) -> int:
    """By mincore(2), which says of each page whether it is there, and is asked through a mapping that touches none."""
    size = file.stat().st_size
    with (
        file.open("rb") as opened,
        mmap.mmap(opened.fileno(), size, prot=mmap.PROT_READ, flags=mmap.MAP_SHARED) as data,
    ):
        address = np.frombuffer(data, np.uint8).ctypes.data
        there = (ctypes.c_ubyte * (size // mmap.PAGESIZE))()
        assert ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), there) == 0
        return sum(page & 1 for page in there)


def test_a_template_that_is_not_utf_8_is_named_with_its_line(copied):
    (copied / "chat_template.jinja").write_bytes("{# one\ncafé #}".encode("latin-1"))
    assert refusal(load_tokenizer, copied) == (
        "base: its chat_template.jinja is not UTF-8: line 2 has the byte 0xe9\nhint: save it as UTF-8"
    )


def test_a_tokenizer_that_skips_merges_at_random_is_refused(copied):
    content = json.loads((copied / "tokenizer.json").read_text())
    content["model"]["dropout"] = 0.1
    (copied / "tokenizer.json").write_text(json.dumps(content))
    assert refusal(load_tokenizer, copied).startswith("base: has a tokenizer that skips merges at random")


def test_what_a_tokenizer_class_raises_is_told_and_is_no_traceback(copied):
    """That of BigBird raises an UnboundLocalError for the vocabulary of another model."""
    edit(copied / "config.json", model_type="big_bird")
    edit(copied / "tokenizer_config.json", tokenizer_class="BigBirdTokenizer")
    assert refusal(load_tokenizer, copied).startswith("base: its tokenizer cannot be loaded: ")


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("config.json", {"architectures": "LlamaForCausalLM"}, "its config.json is damaged: `architectures` is not a"),
        ("config.json", {"architectures": [5]}, "its config.json is damaged: `architectures` is not a list of names"),
        ("config.json", {"model_type": ["llama"]}, "is not a language model: it is of type `['llama']`"),
        ("config.json", {"text_config": {"model_type": "llama"}}, "its config.json is damaged: "),
        ("config.json", {"quantization_config": {"quant_method": "gptq"}}, "is quantized already (gptq), and such"),
        ("config.json", {"quantization_config": {"quant_algo": "FP8"}}, "is quantized already (unknown), and such"),
        (
            "generation_config.json",
            {"eos_token_id": "2"},
            'its generation_config.json is damaged: `eos_token_id` is "2"',
        ),
        ("generation_config.json", {"eos_token_id": [[2]]}, "its generation_config.json is damaged: `eos_token_id` is"),
        (
            "generation_config.json",
            {"cache_implementation": "x"},
            "its generation_config.json is refused (ValueError: ",
        ),
        ("tokenizer_config.json", {"model_max_length": "x"}, "its tokenizer cannot encode a text (TypeError: "),
        ("tokenizer_config.json", {"eos_token": ["x"]}, "its tokenizer cannot be loaded: Special token eos_token has"),
        ("tokenizer_config.json", {"chat_template": 5}, "its tokenizer_config.json is damaged: its `chat_template` is"),
        ("model.safetensors.index.json", {}, "its model.safetensors.index.json is damaged: it has no `weight_map`"),
    ],
)
def test_a_file_with_a_value_of_another_kind_is_named(copied, name, changes, said):
    if name == "tokenizer_config.json":
        (copied / "chat_template.jinja").unlink()
    file = copied / name
    file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | changes))

    def opened(path):
        config, tokenizer = load_config(path), load_tokenizer(path)
        stop_tokens(path, tokenizer, ())
        check_generation_config(path)
        check_weight_files(path)
        return config

    assert refusal(opened, copied).startswith(f"base: {said}")


def test_weights_of_8_bits_without_a_word_in_the_config_are_refused(copied):
    tensors = load_file(copied / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name].to(torch.float8_e4m3fn)}, copied / "model.safetensors")
    assert refusal(check_weight_files, copied) == (
        f"base: is quantized already (`{name}` is F8_E4M3), and such weights cannot be trained\n"
        "hint: name the checkpoint that it was made from; base.quantization: nf4 quantizes that while it is read"
    )


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_file_that_git_lfs_did_not_fetch_is_said_to_be_one(copied, name):
    (copied / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0f\nsize 5\n")
    assert refusal(open_whole, copied) == (
        f"base: its {name} is a pointer of Git LFS, not the file\nhint: fetch it with `git lfs pull`"
    )


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja"])
def test_a_directory_in_the_place_of_a_file_is_named(copied, name):
    (copied / name).unlink()
    (copied / name).mkdir()
    assert refusal(load_config if name == "config.json" else load_tokenizer, copied) == (
        f"base: its {name} is damaged: Is a directory\nhint: download or copy it again"
    )
