"""The checks of a model folder that need not run it. Each has a name and yields problems.

A name in a file must not become a path here.
"""

import re
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from finetune.model.base import templates
from finetune.model.base.remote_code import asked_by
from finetune.package.verify.contents import Finding
from finetune.package.verify.folder import PROCESSORS, Folder
from finetune.store.hub import HUB_ID
from finetune.store.tensors import Place

COMMIT = re.compile(r"[0-9a-f]{40}")
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}
EMBEDDINGS = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|tok_embeddings|embed_in)\.weight$")
HEADS = re.compile(r"(^|\.)(lm_head|embed_out|output)\.weight$")
HALVES = ("BF16", "F16")
OLDER_TEMPLATE = "chat_template.json"  # of processors
PIECE = 1 << 22  # items checked at once
NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}


def header(folder: Folder) -> Iterator[Finding]:
    """Every safetensors file keeps the rules of the format. This includes repeated keys, which other readers accept."""
    if not folder.tensors and not folder.broken:
        yield Finding("header", "model.safetensors", None, "there are no weights as safetensors")
    yield from (finding for finding in folder.broken if finding.check == "header")


def index(folder: Folder) -> Iterator[Finding]:
    """The index names every tensor with its file, and no other; without an index there is one file."""
    indices = sorted(folder.path.glob("*.safetensors.index.json"))
    places = [(name, file) for file, tensors in folder.tensors.items() for name in tensors]
    for name in sorted({name for name, _ in places if sum(name == other for other, _ in places) > 1}):
        yield Finding("index", dict(places)[name], name, "is stored twice")
    if not indices:
        if len(folder.tensors) > 1 and not folder.is_adapter:
            yield Finding(
                "index",
                "model.safetensors.index.json",
                None,
                f"{len(folder.tensors)} files of weights, and no index of them",
            )
        return
    value = folder.json(indices[0].name, "index")
    named = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(named, dict):
        yield Finding("index", indices[0].name, None, "has no `weight_map`")
        return
    there = dict(places)
    for name in sorted(named.keys() | there.keys()):
        if name not in there:
            yield Finding("index", indices[0].name, name, f"is said to be in {named[name]}, and is in no file")
        elif named.get(name) != there[name]:
            yield Finding("index", indices[0].name, name, f"is in {there[name]}, not in {named.get(name)}")


def dtype(folder: Folder) -> Iterator[Finding]:
    """Weights have the type of the config, or a known kept type.

    Our packages name the kept ones. Other models may have fp32 beside half precision: routers, their biases, state-space parameters.
    """
    said = folder.config.get("dtype") or folder.config.get("torch_dtype")
    wanted = DTYPES.get(str(said).removeprefix("torch."))
    # An adapter's config is the base's.
    if wanted is None or folder.is_adapter or folder.config.get("quantization_config"):
        return
    places = [(file, name, place) for file, tensors in folder.tensors.items() for name, place in tensors.items()]
    is_mixed = wanted in HALVES and any(place.dtype == wanted for _, _, place in places)
    for file, name, place in places:
        kept = "F32" if folder.from_base is None and is_mixed else (folder.from_base or {}).get("types", {}).get(name)
        if place.dtype in DTYPES.values() and place.dtype not in (wanted, kept):
            yield Finding("dtype", file, name, f"is {place.dtype}; the config says {said}")


def finite(folder: Folder) -> Iterator[Finding]:
    """No weight is NaN or infinite, and no matrix is all zeros unless it was in the base."""
    zeros = (folder.from_base or {}).get("zeros", [])
    for file, tensors in folder.tensors.items():
        for name, place in tensors.items():
            if place.dtype not in NUMPY and place.dtype != "BF16":
                continue
            is_bad, is_zero = _looked_at(folder.path / file, place)
            if is_bad:
                yield Finding("finite", file, name, "has NaN or infinite values")
            if is_zero and len(place.shape) > 1 and "lora_B" not in name and name not in zeros:
                yield Finding("finite", file, name, "is all zeros")


def _looked_at(path: Path, place: Place) -> tuple[bool, bool]:
    """(has NaN or Inf, is all zeros). The bits of bf16 are the upper half of fp32's."""
    data = (
        np.memmap(path, np.uint8, "r", place.start, (place.end - place.start,))
        if place.end > place.start
        else np.zeros(0)
    )
    is_bad, is_zero = False, bool(data.size)
    for first in range(0, data.size, PIECE * 8):
        piece = np.ascontiguousarray(data[first : first + PIECE * 8])
        if place.dtype == "BF16":
            values = (piece.view("<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            values = piece.view(NUMPY[place.dtype])
        is_bad |= not np.isfinite(values).all()
        is_zero &= not values.any()
    return is_bad, is_zero


def config(folder: Folder) -> Iterator[Finding]:
    """Configs are JSON objects, and the model's config names its type."""
    yield from (finding for finding in folder.broken if finding.check == "config")
    if not folder.is_adapter and not isinstance(folder.config.get("model_type"), str):
        yield Finding("config", "config.json", None, "does not say its model_type")


def remote_code(folder: Folder) -> Iterator[Finding]:
    """No config asks a loader to run code."""
    for file, value in folder.configs.items():
        for key in dict.fromkeys(asked_by(value)):
            yield Finding("remote_code", file, None, f"has `{key}`, by which a loader runs code of a repository")
    for path in sorted(folder.path.rglob("*.py")):
        yield Finding("remote_code", path.relative_to(folder.path).as_posix(), None, "is code")


def vocabulary(folder: Folder) -> Iterator[Finding]:
    """Tokens fit the vocabulary, the vocabulary fits the embeddings, and every token id in a config exists."""
    size = folder.config.get("vocab_size")
    if not isinstance(size, int):
        return
    if (found := folder.first(EMBEDDINGS)) and found[2].shape[0] < size:
        yield Finding("vocabulary", found[0], found[1], f"has {found[2].shape[0]:,} rows for a vocabulary of {size:,}")
    tokens = folder.tokens
    if tokens and (largest := max(tokens.values())) >= size:
        yield Finding("vocabulary", "tokenizer.json", None, f"has the token {largest:,}; the model has {size:,}")
    for file in ("config.json", "generation_config.json"):
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            ids = folder.configs.get(file, {}).get(key)
            for one in ids if isinstance(ids, list) else [ids]:
                if isinstance(one, int) and not 0 <= one < size:
                    yield Finding("vocabulary", file, None, f"`{key}` is {one:,}; the model has {size:,} tokens")


def tokenizer(folder: Folder) -> Iterator[Finding]:
    """Special tokens are in the tokenizer, and generation ends at its end-of-text token."""
    tokens = folder.tokens
    yield from (finding for finding in folder.broken if finding.check == "tokenizer")
    settings = folder.configs.get("tokenizer_config.json", {})
    for key in ("bos_token", "eos_token", "pad_token", "unk_token"):
        token = settings.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and tokens and token not in tokens:
            yield Finding("tokenizer", "tokenizer_config.json", None, f"`{key}` {token!r} is not in tokenizer.json")
        ends = folder.configs.get("generation_config.json", {}).get("eos_token_id")
        ends = ends if isinstance(ends, list) else [ends]
        if key == "eos_token" and token in tokens and ends != [None] and tokens[token] not in ends:
            message = f"generation does not end at {token!r}, token {tokens[token]}, but at {ends}"
            yield Finding("tokenizer", "generation_config.json", None, message)


def template(folder: Folder) -> Iterator[Finding]:
    """Chat templates render a short conversation in the sandbox, within bounds of time and memory."""
    settings = folder.configs.get("tokenizer_config.json", {})
    found = [("tokenizer_config.json", text) for text in templates.texts(settings.get("chat_template"))]
    if (folder.path / OLDER_TEMPLATE).is_file():
        value = folder.json(OLDER_TEMPLATE, "template")
        found += [
            (OLDER_TEMPLATE, text)
            for text in templates.texts(value.get("chat_template") if isinstance(value, dict) else None)
        ]
    for path in [*folder.path.glob("chat_template.jinja"), *sorted(folder.path.glob("additional_chat_templates/*"))]:
        found.append((path.relative_to(folder.path).as_posix(), path.read_text(encoding="utf-8", errors="replace")))
    for file, text in found:
        if problem := templates.problem(text):
            yield Finding("template", file, None, problem)


def processor(folder: Folder) -> Iterator[Finding]:
    """A model that also reads images or sound has files for preparing them, unless its base had none."""
    parts = [name for name in ("vision_config", "audio_config") if folder.config.get(name)]
    declared = str((folder.config.get("architectures") or [""])[0])
    is_text = folder.is_adapter or not parts or not declared.endswith("ForConditionalGeneration")
    if is_text or any(fnmatchcase(name, PROCESSORS) for name in folder.configs):
        return
    if folder.from_base is None or folder.from_base.get("processors"):
        message = f"is missing, and {declared} has `{parts[0]}`: nothing says how images or sound are prepared"
        yield Finding("processor", "preprocessor_config.json", None, message)


def tied(folder: Folder) -> Iterator[Finding]:
    """Input and output embeddings are stored tied or untied, as the config says."""
    text = folder.config.get("text_config") or folder.config
    is_tied = folder.config.get("tie_word_embeddings", text.get("tie_word_embeddings"))
    embeddings, head = folder.first(EMBEDDINGS), folder.first(HEADS)
    if folder.is_adapter or is_tied is None or embeddings is None:
        return
    is_language_model = any("ForCausalLM" in str(name) for name in folder.config.get("architectures") or [])
    if is_tied and head and head[2].shape == embeddings[2].shape and _bytes(folder, head) != _bytes(folder, embeddings):
        yield Finding("tied", head[0], head[1], "is stored, and is not the embeddings that the config ties it to")
    others = (place for places in folder.tensors.values() for name, place in places.items() if name != embeddings[1])
    # the name of the head differs by family: it is a matrix with a row for each token
    has_head = any(len(place.shape) == 2 and place.shape[0] == embeddings[2].shape[0] for place in others)
    if not is_tied and not has_head and is_language_model:
        yield Finding("tied", "config.json", None, "ties no embeddings, and the output's are not stored")


def _bytes(folder: Folder, item: tuple[str, str, Place]) -> bytes:
    with (folder.path / item[0]).open("rb") as file:
        file.seek(item[2].start)
        return file.read(item[2].end - item[2].start)


def base(folder: Folder) -> Iterator[Finding]:
    """An adapter names its base so that others can find it: Hub id and commit."""
    if not folder.is_adapter:
        return
    value = folder.configs["adapter_config.json"]
    name, revision = value.get("base_model_name_or_path"), value.get("revision")
    if not isinstance(name, str) or not HUB_ID.fullmatch(name):
        yield Finding("base", "adapter_config.json", None, f"names its base {name!r}, which is no Hub id")
    if revision is not None and not COMMIT.fullmatch(str(revision)):
        yield Finding("base", "adapter_config.json", None, f"pins its base to {revision!r}, which is no commit")


CHECKS: dict[str, Callable[[Folder], Iterator[Finding]]] = {
    "header": header,
    "index": index,
    "dtype": dtype,
    "finite": finite,
    "config": config,
    "remote_code": remote_code,
    "vocabulary": vocabulary,
    "tokenizer": tokenizer,
    "template": template,
    "processor": processor,
    "tied": tied,
    "base": base,
}
