"""A tokenizer in Mistral's own file (`tekken.json`) alone: converted once to a tokenizer.json, by transformers' own converter.

Opened as it is, it has no special tokens, and so no end of text, unless a tokenizer_config.json names them.
"""

import json
from pathlib import Path

from finetune import version
from finetune.errors import BaseError, explained
from finetune.model.base.damaged import name_of, read_json
from finetune.model.base.files import file_digest
from finetune.plan.encodings import VOCABULARIES
from finetune.store import cache

FILE = "tekken.json"
FAST, SETTINGS = "tokenizer.json", "tokenizer_config.json"
OF_A_CLASS = ("tokenizer_class", "backend", "auto_map", "vocab_file")  # settings that name the program to open it with
CONVERSION = 1  # of `converted`; part of the cache key


def converted(directory: Path) -> list[Path]:
    """The converted tokenizer and its settings, in the cache; none if the directory has another vocabulary, or no tekken.json.

    None either if its settings name an end of text: transformers opens it as it is, and runs of older code are pinned to it.
    """
    file = directory / FILE
    if not file.is_file() or {found.name for each in VOCABULARIES for found in directory.glob(each)} != {FILE}:
        return []
    own = directory / SETTINGS
    said = read_json(own) if own.is_file() else {}
    if said.get("eos_token"):
        return []
    digests = "-".join(file_digest(each)[:24] for each in (file, own) if each.is_file())

    def build(target: Path) -> None:
        if "special_tokens" not in read_json(file) and not _has_mistral_common():
            message, hint = f"its {FILE} is of an old kind, which needs mistral-common", "pip install mistral-common"
            raise BaseError(message, where=name_of(directory), hint=hint)
        with explained(f"its {FILE} cannot be read", name_of(directory), "download or copy it again"):
            _convert(file, target)
        settings = read_json(target / SETTINGS)
        settings |= {name: value for name, value in said.items() if name not in OF_A_CLASS and value is not None}
        (target / SETTINGS).write_text(f"{json.dumps(settings, indent=2)}\n", encoding="utf-8")

    place = cache.built("tekken", f"{digests}-{version('transformers')}-{CONVERSION}", build)
    return [place / FAST, place / SETTINGS]


def _convert(file: Path, target: Path) -> None:
    from transformers.integrations.mistral.tokenizer import convert_tekken_tokenizer

    # Without a template of its own: with mistral-common installed it would get one, and plans would depend on that.
    tokenizer = convert_tekken_tokenizer(str(file), chat_template="")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(target)


def _has_mistral_common() -> bool:
    from transformers.utils import is_mistral_common_available

    return is_mistral_common_available()
