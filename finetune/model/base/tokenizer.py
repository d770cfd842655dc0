"""The tokenizer of a checkpoint, and the small files beside it that name code or end generation."""

import json
from collections.abc import Sequence
from pathlib import Path

from transformers import GenerationConfig, PreTrainedTokenizerBase

from finetune.errors import BaseError, DataError, explained, of_libraries
from finetune.model.base import native, tekken, templates
from finetune.model.base.damaged import damaged, name_of, read_json
from finetune.model.base.files import TEMPLATES, has_tokenizer
from finetune.model.base.quiet import quiet
from finetune.model.base.remote_code import asked_by

OLDER_TEMPLATE = "chat_template.json"
RELOAD = "download or copy its tokenizer's files again"


def refuse_remote_code(path: Path) -> None:
    """Configs are data: read as JSON, before a library reads more into them."""
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        if (path / name).is_file() and (key := next(asked_by(read_json(path / name)), None)):
            message = f"needs its own code (`{key}` in {name}), which is never run"
            raise BaseError(message, where=name_of(path), hint="choose a base that transformers knows")


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a directory with the model's config: transformers chooses its class by that.

    Every command opens tokenizers here. Only a fast one maps tokens to characters.
    """
    refuse_remote_code(path)
    native.refuse_own_tokenizer(path)
    _refuse_unreadable_templates(path)
    # A relative path may look like a Hub id with an exception in transformers.
    tokenizer = _tokenizer(path.absolute())
    if not tokenizer.chat_template and (path / OLDER_TEMPLATE).is_file():
        tokenizer.chat_template = _older_template(path / OLDER_TEMPLATE)
    if not tokenizer.is_fast or not len(tokenizer):
        raise BaseError("has no fast tokenizer, which is needed to tell assistant tokens apart", where=name_of(path))
    with explained("its tokenizer cannot encode a text", name_of(path), RELOAD):
        tokenizer("a", return_offsets_mapping=True)
    if getattr(tokenizer.backend_tokenizer.model, "dropout", None):
        message, hint = "has a tokenizer that skips merges at random", "set `dropout` to null in its tokenizer.json"
        raise BaseError(message, where=name_of(path), hint=hint)
    if not templates.is_known_form(tokenizer.chat_template):
        raise damaged(path / "tokenizer_config.json", "its `chat_template` is neither text nor named texts")
    for template in templates.texts(tokenizer.chat_template):
        if problem := templates.problem(template):
            hint = "choose another base, or fix the template: what renders it may not survive it"
            raise BaseError(f"has a chat template that {problem}", where=name_of(path), hint=hint)
    return tokenizer


def _tokenizer(path: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        # With mistral-common installed its own class, which is not fast, would come before a tokenizer.json.
        options = {"mistral_format": False} if (path / tekken.FILE).is_file() else {}
        return AutoTokenizer.from_pretrained(path, **options)
    except Exception as error:
        if not isinstance(error, of_libraries()) and type(error) is not Exception:  # tokenizers raises bare ones
            raise
        if not has_tokenizer(path):
            raise no_tokenizer(name_of(path), path) from None
        if (path / "tokenizer.json").exists():
            read_json(path / "tokenizer.json")  # tells what is wrong with a torn file
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise BaseError(
            f"its tokenizer cannot be loaded: {reason}",
            where=name_of(path),
            hint=RELOAD if (path / "tokenizer.json").exists() else "add its tokenizer.json",
        ) from error


def _older_template(file: Path) -> str:
    """The template that transformers reads for a processor alone: models with images were once published with no other."""
    template = read_json(file).get("chat_template")
    if not isinstance(template, str):
        raise damaged(file, "its `chat_template` is not text")
    return template


def _refuse_unreadable_templates(path: Path) -> None:
    for file in sorted(file for pattern in TEMPLATES for file in path.glob(pattern)):
        try:
            templates.decoded(file.read_bytes())
        except ValueError as error:
            raise BaseError(f"its {file.name} {error}", where=name_of(path), hint="save it as UTF-8") from None
        except OSError as error:
            raise damaged(file, str(error.strerror)) from None


def no_tokenizer(where: str, directory: Path) -> BaseError:
    """The error for a checkpoint without one: Trainer saves none unless you pass it one."""
    hint = f"copy tokenizer.json and tokenizer_config.json of the model that it was trained from into {directory}"
    return BaseError("has no tokenizer", where=where, hint=hint)


def named_stops(tokenizer: PreTrainedTokenizerBase, names: Sequence[str]) -> list[int]:
    """The ids of the tokens that a recipe's `task.stop` names. DataError for a text that is not one token."""
    found = []
    for name in names:
        ids = tokenizer.encode(name, add_special_tokens=False)
        known = tokenizer.get_vocab().get(name, ids[0] if len(ids) == 1 else None)
        if known is None:
            special = ", ".join(f"`{token}`" for token in tokenizer.all_special_tokens) or "none"
            message = f"`{name}` is not one token of the base's tokenizer"
            raise DataError(message, where="task.stop", hint=f"its special tokens are {special}")
        found.append(known)
    return found


def stop_tokens(path: Path, tokenizer: PreTrainedTokenizerBase, named: Sequence[str]) -> frozenset[int]:
    """Ids that end generation, by tokenizer and generation config together, and the `named` tokens."""
    stops = {tokenizer.eos_token_id, *named_stops(tokenizer, named)}
    if (path / "generation_config.json").exists():
        ends = read_json(path / "generation_config.json").get("eos_token_id")
        found = ends if isinstance(ends, list) else [ends]
        if not all(token is None or isinstance(token, int) for token in found):
            reason = f"`eos_token_id` is {json.dumps(ends)}, not an id or a list of ids"
            raise damaged(path / "generation_config.json", reason)
        stops.update(found)
    return frozenset(stops - {None})


def check_generation_config(path: Path) -> None:
    """BaseError if transformers refuses it, as it would when it opens the model."""
    if (path / "generation_config.json").is_file():
        with quiet(), explained("its generation_config.json is refused", name_of(path), "correct or remove the file"):
            GenerationConfig.from_pretrained(path)
