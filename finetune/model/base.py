"""Floor 1. The one place that loads weights: where a base is, what exactly it is, and its config, tokenizer and model.

No code from a checkpoint is ever run and no pickle is ever read: `auto_map` is refused, weights are safetensors only.
`resolve` pins a base, `state` loads it, `package/export` loads it again.
"""

import contextlib
import importlib.util
import io
import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import blake3
import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from finetune import cache
from finetune.checkpoints.refs import Ref, find, parse
from finetune.checkpoints.tensors import read_header
from finetune.errors import BaseError, CheckpointError
from finetune.plan import PinnedBase
from finetune.recipe.schema import Base

WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt")  # config, tokenizer, template
# `*` matches `/` too: leave out exports in folders, and Mistral's second copy of its weights.
OTHER_FILES = ("*/*", "consolidated*")
CONVERT = "convert it: load it in transformers once and call save_pretrained"
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model"),
)
LICENCES = ("README.md", "LICENSE*", "NOTICE*")  # what a package passes on
LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
CONVERSION = 1  # of the GGUF conversion below; part of the cache key


def pin(base: Base) -> PinnedBase:
    """What exactly the base is: the commit of a Hub id, or a digest over the files of a local one."""
    ref = parse(base.checkpoint)
    if ref.kind == "hub":
        return PinnedBase(kind="hub", revision=_commit_of(ref.repo, base.revision or ref.revision), digest=None)
    if base.revision is not None:
        raise BaseError("`base.revision` goes with a Hub checkpoint only", where=base.checkpoint, hint="remove it")
    return PinnedBase(kind="package" if ref.kind == "package" else "directory", revision=None, digest=_pin_of(ref))


def directory(base: Base, pinned: PinnedBase, with_weights: bool = True) -> Path:
    """A directory that `from_pretrained` reads, downloaded or converted if need be; checked against the pin."""
    ref = parse(base.checkpoint)
    if ref.kind == "hub":
        path = _download(ref.repo, pinned.revision, SMALL_FILES + LICENCES + (WEIGHTS if with_weights else ()))
        if not with_weights:
            _check_has_weights(ref.repo, pinned.revision)
        return path
    if _pin_of(ref) != pinned.digest:
        raise BaseError(
            "is not what it was when the run was planned", where=base.checkpoint, hint="restore it, or start a new run"
        )
    return _local(ref)


def load_config(path: Path) -> PretrainedConfig:
    """The config of a language model; read as JSON first, so that nothing in it can name code to run."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if not (path / "config.json").exists():
        message, hint = "has no config.json, so it is not a checkpoint", "name a transformers checkpoint"
        raise BaseError(message, where=_name(path), hint=hint)
    raw = _json(path / "config.json")
    if "auto_map" in raw:
        message, hint = (
            "needs code of its own (`auto_map`), which is never run",
            "choose a base that transformers knows",
        )
        raise BaseError(message, where=_name(path), hint=hint)
    architectures = raw.get("architectures") or []
    is_known = raw.get("model_type") in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if not is_known or (architectures and not any(name.endswith(LANGUAGE_MODELS) for name in architectures)):
        what = (
            architectures[0]
            if is_known
            else f"of type `{raw.get('model_type')}`, which has no causal LM in transformers"
        )
        raise BaseError(
            f"is not a language model: it is {what}", where=_name(path), hint="choose a base that generates text"
        )
    try:
        return AutoConfig.from_pretrained(path)
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
        raise _damaged(path / "config.json", " ".join(str(error).split())) from None


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer; only a fast one tells which characters a token stands for."""
    from transformers import AutoTokenizer

    if (path / "tokenizer.json").exists():
        _json(path / "tokenizer.json")  # tokenizers answers a torn file with a bare Exception
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise BaseError(
            f"its tokenizer cannot be loaded: {reason}", where=_name(path), hint="add its tokenizer.json"
        ) from None
    if not tokenizer.is_fast or not len(tokenizer):
        raise BaseError("has no fast tokenizer, which is needed to tell assistant tokens apart", where=_name(path))
    return tokenizer


def stop_tokens(path: Path, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids that end generation, by tokenizer and generation config together."""
    stops = {tokenizer.eos_token_id}
    if (path / "generation_config.json").exists():
        named = _json(path / "generation_config.json").get("eos_token_id")
        stops.update(named if isinstance(named, list) else [named])
    return frozenset(stops - {None})


def load_model(path: Path, dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> torch.nn.Module:
    """The model with all its weights, on the CPU, in eval mode. A missing weight or one of another shape is an error.

    Weights that the model has no place for stay unread: checkpoints often carry the heads of other tasks.
    """
    from transformers import AutoModelForCausalLM

    config = load_config(path)
    _check_weight_files(path)
    with _quiet():
        model, info = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            attn_implementation=attention,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # so that they are listed below, not thrown as a table
            output_loading_info=True,
        )
    for kind in ("missing_keys", "mismatched_keys"):
        if names := sorted(str(key[0] if isinstance(key, tuple) else key) for key in info[kind]):
            wrong = f"lacks weights of its own config ({kind.replace('_', ' ')}): {', '.join(names[:3])}"
            raise BaseError(wrong, where=_name(path))
    model.config.use_cache = False  # with a cache, packed rows would silently see one another
    return model


def _check_weight_files(path: Path) -> None:
    """Refuses pickles, torn files and missing shards before transformers meets them."""
    index = path / "model.safetensors.index.json"
    named = set(_json(index).get("weight_map", {}).values()) if index.exists() else {"model.safetensors"}
    if not list(path.glob("*.safetensors")):
        raise BaseError("has no safetensors weights", where=_name(path), hint=CONVERT)
    for name in sorted(named):
        if not (path / name).is_file():
            raise BaseError(f"lacks its weight file {name}", where=_name(path), hint="download or copy it again")
        try:
            read_header(path / name)
        except CheckpointError as error:
            raise _damaged(path / name, error.message) from None


def _json(path: Path) -> dict:
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise _damaged(path, str(error)) from None
    if not isinstance(value, dict):
        raise _damaged(path, "it does not hold an object")
    return value


def _damaged(path: Path, reason: str) -> BaseError:
    return BaseError(
        f"its {path.name} is damaged: {reason}", where=_name(path.parent), hint="download or copy it again"
    )


def empty_model(path: Path) -> torch.nn.Module:
    """The model on the meta device: names and shapes, no memory, for counting and for checking an adapter."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"), _quiet():
        model = AutoModelForCausalLM.from_config(load_config(path))
    model.tie_weights()
    return model


def _name(path: Path) -> str:
    """What errors call a base: its Hub id where it is a snapshot in the Hub's cache, else the directory's name."""
    if path.parent.name == "snapshots":
        return path.parents[1].name.removeprefix("models--").replace("--", "/")
    return path.name


def _local(ref: Ref) -> Path:
    """The directory of a base that is not on the Hub."""
    if ref.kind == "package":
        return _converted(_package_file(ref))
    if ref.kind == "run":
        ref = Ref("checkpoint", ref.text, path=find(ref).path)
    if not ref.path.is_dir():
        raise BaseError("is not there", where=ref.text, hint="name a directory, a Hub id, or package:NAME/file.gguf")
    if (ref.path / "adapter_config.json").exists():
        raise BaseError(
            "is an adapter, not a whole model", where=ref.text, hint="package it merged first: finetune package REF DIR"
        )
    return ref.path


def _package_file(ref: Ref) -> Path:
    """A file inside an installed package, found without importing it."""
    spec = importlib.util.find_spec(ref.repo.partition(".")[0])
    if spec is None or not spec.submodule_search_locations:
        raise BaseError(f"no installed package is called `{ref.repo}`", where=ref.text, hint="install it with pip")
    directory = Path(next(iter(spec.submodule_search_locations)), *ref.repo.split(".")[1:])
    if not (directory / ref.path).is_file():
        there = ", ".join(sorted(path.name for path in directory.glob("*.gguf"))) or "no GGUF file"
        raise BaseError(f"the package has no file {ref.path}", where=ref.text, hint=f"it has {there}")
    return directory / ref.path


def _converted(gguf: Path) -> Path:
    """A GGUF file as safetensors, dequantised to fp32: done once, kept in the cache by the file's digest."""
    key = f"{_file_digest(gguf)[:32]}-{CONVERSION}"

    def convert(target: Path) -> None:
        print(f"converting {gguf.name} to safetensors, once (about 20 seconds)", file=sys.stderr, flush=True)
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        with _quiet():
            model = AutoModelForCausalLM.from_pretrained(
                gguf.parent,
                gguf_file=gguf.name,
                quantization_config=GgufConfig(
                    dequantize=True
                ),  # else the model stays quantised and refuses to be saved
                dtype=torch.float32,
            )
            model.save_pretrained(target)
            AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)

    return cache.built("converted", key, convert)


def _pin_of(ref: Ref) -> str:
    """What a local base is: the file inside a package, not what some version of transformers makes of it."""
    if ref.kind == "package":
        return f"blake3:{_file_digest(_package_file(ref))}"
    return _digest(_local(ref))


def _digest(path: Path) -> str:
    """Over names and contents of the files that make the checkpoint."""
    total = blake3.blake3()
    for file in sorted(
        file for pattern in SMALL_FILES + WEIGHTS for file in path.glob(pattern) if file.name != "manifest.json"
    ):
        total.update(f"{file.name}\0{_file_digest(file)}\0".encode())
    return "blake3:" + total.hexdigest()


def _file_digest(path: Path) -> str:
    return blake3.blake3(max_threads=blake3.blake3.AUTO).update_mmap(path).hexdigest()


def _commit_of(repo: str, revision: str | None) -> str:
    """The commit of a revision now; where the Hub cannot be reached, the one that was last seen from here."""
    import huggingface_hub

    with _hub_errors(repo, revision):
        return huggingface_hub.HfApi().resolve_revision(repo, revision=revision).resolved


def _download(repo: str, commit: str, patterns: tuple[str, ...]) -> Path:
    import huggingface_hub

    with _hub_errors(repo, commit):
        path = huggingface_hub.snapshot_download(
            repo, revision=commit, allow_patterns=list(patterns), ignore_patterns=list(OTHER_FILES)
        )
    return Path(path)


def _check_has_weights(repo: str, commit: str) -> None:
    """Refuses a Hub base without safetensors before anything heavy is downloaded; offline, loading finds out."""
    import huggingface_hub
    from huggingface_hub.errors import DryRunError, LocalEntryNotFoundError

    with contextlib.suppress(DryRunError, LocalEntryNotFoundError):
        if not huggingface_hub.snapshot_download(
            repo, revision=commit, allow_patterns=list(WEIGHTS), ignore_patterns=list(OTHER_FILES), dry_run=True
        ):
            raise BaseError("has no safetensors weights", where=repo, hint=CONVERT)


@contextmanager
def _hub_errors(repo: str, revision: str | None) -> Iterator[None]:
    from httpx2 import HTTPError
    from huggingface_hub import errors

    where = f"{repo}@{revision}" if revision else repo
    try:
        yield
    except errors.GatedRepoError:
        raise BaseError("is gated", where=where, hint="ask for access at its page, then set HF_TOKEN") from None
    except errors.RepositoryNotFoundError:
        raise BaseError(
            "is not on the Hub, or private", where=where, hint="check the name; for a private one set HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise BaseError(
            "the repository has no such revision", where=where, hint="name a branch, a tag or a commit"
        ) from None
    except (errors.RevisionResolutionError, HTTPError, OSError) as error:
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        raise BaseError(
            f"the Hub cannot be reached: {reason}",
            where=where,
            hint="`finetune fetch` a recipe where there is a network",
        ) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Loading without the progress bars and notices of libraries, which would break up our own lines; errors still raise."""
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings(action="ignore"):
        yield
