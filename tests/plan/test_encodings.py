"""Whatever can change a token changes the digest of a plan or the key of encoded rows: files and settings are changed one at a time."""

import base64
import json
import shutil
from pathlib import Path
from typing import Literal

import pytest

from finetune.model.base import load_tokenizer
from finetune.plan import encodings
from finetune.recipe.schema import ChatTask, TextTask
from finetune.tasks.chat import encoder
from finetune.training.encoding import template_and_encoding
from tests.conftest import CHATML

CHAT = ChatTask(name="chat")
CONTROL = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
SPECIAL = {"bos_token": "<s>", "eos_token": "<|im_end|>", "chat_template": CHATML}


def key_of(directory: Path, task: ChatTask | TextTask = CHAT) -> tuple[str, str]:
    tokenizer = load_tokenizer(directory)
    encoding = template_and_encoding(task, directory, tokenizer)[1]
    return encoding, encodings.key(encoding, task, tokenizer, None)


def tekken(directory: Path) -> None:
    """As Mistral's newer models have it, and nothing else."""
    special = [{"rank": rank, "token_str": text, "is_control": True} for rank, text in enumerate(CONTROL)]
    words = [bytes([byte]) for byte in range(256)] + [b"th", b"the"]
    vocab = [
        {"rank": rank, "token_bytes": base64.b64encode(word).decode(), "token_str": None}
        for rank, word in enumerate(words)
    ]
    sizes = {"default_vocab_size": len(words) + len(special), "default_num_special_tokens": len(special)}
    config = {"pattern": r"[a-z]+|\s+|.", "num_vocab_tokens": len(words), **sizes}
    (directory / "tekken.json").write_text(json.dumps({"config": config, "vocab": vocab, "special_tokens": special}))
    (directory / "config.json").write_text(json.dumps({"model_type": "mistral"}))
    (directory / "tokenizer_config.json").write_text(json.dumps(SPECIAL))


def words_and_merges(directory: Path) -> None:
    """As GPT-2 and Qwen 2 have it, and nothing else."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    words = [*CONTROL, *bytes_to_unicode().values(), "th", "the"]
    (directory / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (directory / "merges.txt").write_text("#version: 0.2\nt h\nth e\n")
    (directory / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (directory / "tokenizer_config.json").write_text(json.dumps(SPECIAL | {"tokenizer_class": "GPT2Tokenizer"}))
    (directory / "added_tokens.json").write_text(json.dumps({"<extra>": len(words)}))
    (directory / "special_tokens_map.json").write_text(json.dumps({"unk_token": "<unk>"}))


def one_file(directory: Path) -> None:
    """As most have it now, made of the one before."""
    words_and_merges(directory)
    tokenizer = load_tokenizer(directory)
    for file in directory.iterdir():
        file.unlink()
    tokenizer.save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [4]}))


@pytest.fixture(params=[tekken, words_and_merges, one_file], ids=lambda make: make.__name__)
def tokenizer_files(request, tmp_path) -> Path:
    directory = tmp_path / "base"
    directory.mkdir()
    request.param(directory)
    return directory


def test_each_file_of_a_tokenizer_is_in_the_digest(tokenizer_files, tmp_path):
    encoding, key = key_of(tokenizer_files)
    assert key_of(shutil.copytree(tokenizer_files, tmp_path / "elsewhere")) == (encoding, key), "not where it is"
    changed = 0
    for name in sorted(file.name for file in tokenizer_files.iterdir()):
        directory = shutil.copytree(tokenizer_files, tmp_path / name)
        file = directory / name
        if name == "config.json":  # what it does is in the key, and a base's whole config is in its pin
            continue
        if name == "generation_config.json":
            file.write_text(json.dumps({"eos_token_id": [4, 1]}))
        else:
            text = file.read_text()
            ends = {".json": f"{text} ", ".jinja": f"{text}{{# more #}}", ".txt": text.replace("0.2", "0.3")}
            file.write_text(ends[file.suffix])
        changed += 1
        assert key_of(directory)[0] != encoding, name
    assert changed >= 2


def test_a_class_that_another_config_chooses_is_in_the_key(tmp_path):
    one_file(tmp_path)
    encoding, key = key_of(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    again, other = key_of(tmp_path)
    assert again == encoding and other != key


def test_another_day_is_in_the_key(tmp_path):
    one_file(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    days = {encodings.key("encoding", CHAT, tokenizer, day) for day in (None, "2026-11-29", "2026-11-30")}
    assert len(days) == 3


@pytest.mark.parametrize("section", [ChatTask, TextTask])
def test_each_setting_of_a_task_is_in_the_digest_or_changes_no_token(section, tmp_path, tiny_base, tiny_tokenizer):
    name = {ChatTask: "chat", TextTask: "text"}[section]
    before, _ = key_of(tiny_base, section(name=name))
    (tmp_path / "own.jinja").write_text("{# own #}" + CHATML)
    values = {"max_length": 9, "packing": False, "template": str(tmp_path / "own.jinja")}
    values |= {
        "template_variables": {"mode": "brief"},
        "stop": ["<|endoftext|>"],
        "learn": "all",
        "system": "Be brief.",
    }
    assert section.model_fields.keys() - {"name"} <= values.keys(), "give the new setting another value here"
    for setting in section.model_fields.keys() - {"name"}:
        after, _ = key_of(tiny_base, section(name=name, **{setting: values[setting]}))
        assert (after == before) == (setting in encodings.ARRANGEMENT), setting
    for setting in encodings.ARRANGEMENT & section.model_fields.keys() if section is ChatTask else ():
        row = {"prompt": "it was", "completion": "said"}
        [[one]], [[other]] = (
            encoder(tiny_tokenizer, task, {tiny_tokenizer.eos_token_id})([row], ["row"])
            for task in (CHAT, ChatTask(name="chat", **{setting: values[setting]}))
        )
        assert one.tokens.tolist() == other.tokens.tolist()


def test_a_setting_that_a_later_version_adds_is_in_the_digest_and_leaves_older_plans_as_they_are(tiny_base):
    class Later(ChatTask):
        tone: Literal["plain", "kind"] = "plain"

    before, _ = key_of(tiny_base)
    assert key_of(tiny_base, Later(name="chat"))[0] == before
    assert key_of(tiny_base, Later(name="chat", tone="kind"))[0] != before


def test_a_template_counts_by_its_text_and_not_by_its_place(tiny_base, tmp_path):
    for name in ("one.jinja", "other.jinja"):
        (tmp_path / name).write_text(CHATML)
    one, other = (
        key_of(tiny_base, ChatTask(name="chat", template=str(tmp_path / f"{name}.jinja"))) for name in ("one", "other")
    )
    assert one == other


def test_the_digest_of_older_plans_is_made_as_it_was(tiny_base, tiny_tokenizer):
    """As commit 9392744 made it; the runs in tests/fixtures/older_run hold one too."""
    import hashlib

    total = hashlib.sha256(json.dumps(["chat", 1024, CHATML, [2]]).encode())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        total.update(f"\0{name}\0".encode() + (tiny_base / name).read_bytes())
    digest = encodings.older_digest(CHAT, tiny_base, CHATML, [2])
    assert digest == f"sha256:{total.hexdigest()}" and encodings.is_older(digest)
    assert not encodings.is_older(key_of(tiny_base)[0])


def test_the_whole_section_of_a_task_is_in_the_key_of_its_rows_also_where_an_older_digest_lacks_it(
    tiny_base, tiny_tokenizer
):
    """Else a recipe would train on rows that another one had encoded."""

    class Later(ChatTask):
        tone: Literal["plain", "kind"] = "plain"

    def older(task: ChatTask) -> tuple[str, str]:
        digest = encodings.older_digest(task, tiny_base, CHATML, [2])
        return digest, encodings.key(digest, task, tiny_tokenizer, None)

    one, other = older(Later(name="chat")), older(Later(name="chat", tone="kind"))
    assert one[0] == other[0] and one[1] != other[1]
    assert older(CHAT)[1] != one[1], "also a setting that has its default"
    assert older(ChatTask(name="chat", packing=False)) == older(CHAT), "it changes no token"
