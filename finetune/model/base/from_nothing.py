"""A base of which only config and tokenizer count: its weights are drawn at random, by the seed that the recipe names."""

import json
import sys
from pathlib import Path

import blake3
import torch
from transformers import PreTrainedModel

from finetune import version
from finetune.errors import BaseError
from finetune.model.base import files, view
from finetune.model.base.load import empty_model, load_config
from finetune.model.base.loading_class import class_of, made
from finetune.model.base.merged import write_merged
from finetune.model.base.quiet import quiet
from finetune.plan.plan import PinnedBase
from finetune.store import cache
from finetune.store.checkpoints.refs import Ref

KIND = "config"
DRAWING = 1  # of `directory`; part of the cache key


def pinned(ref: Ref, commit: str | None = None) -> PinnedBase:
    """The pin of a config and a tokenizer, in a directory or a commit on the Hub, whatever weights are beside them."""
    if ref.kind == "hub" and not ref.file:
        return PinnedBase(kind=KIND, revision=commit, digest=None)
    if ref.kind != "model" or not (ref.path / files.CONFIG).is_file():
        message, hint = "`base.random_weights` needs the config of a model", "name a directory or a Hub id of one"
        raise BaseError(message, where=ref.text, hint=hint)
    return PinnedBase(kind=KIND, revision=None, digest=digest(ref.path))


def digest(path: Path) -> str:
    """Over names and contents of config, tokenizer and template."""
    return f"blake3:{blake3.blake3(files.small_digest(path, with_index=False).encode()).hexdigest()}"


def directory(source: Path, seed: int, where: str, with_weights: bool) -> Path:
    """A copy of the config and tokenizer in `source`, with weights as transformers draws them in fp32 for a new model.

    Drawn once and kept in the cache: another version of torch may draw other numbers.
    """
    origin = view.origin_of(source)

    def build(target: Path) -> None:
        if origin:
            (target / view.ORIGIN).write_text(json.dumps(origin))
        if not with_weights:
            write_merged(empty_model(source), source, source, target, where)
            return
        print(f"drawing weights for {where}, once", file=sys.stderr, flush=True)
        write_merged(_drawn(source, seed), source, source, target, where)

    key = [
        digest(source),
        json.dumps(origin),
        *([str(seed)] if with_weights else []),
        *map(version, ("torch", "transformers")),
    ]
    name = blake3.blake3("\0".join(key).encode()).hexdigest()[:32]
    return cache.built("random" if with_weights else "random-configs", f"{name}-{DRAWING}", build)


def _drawn(source: Path, seed: int) -> PreTrainedModel:
    config = load_config(source)
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(seed)
        return made(class_of(config), config, dtype=torch.float32)
