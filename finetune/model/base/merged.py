"""An adapter merged onto its base, as a directory: weights, config and small files."""

import json
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel

from finetune.model.base import files
from finetune.model.base.damaged import read_json
from finetune.model.base.outline import with_dtype
from finetune.model.base.quiet import quiet
from finetune.model.base.tokenizer import no_tokenizer
from finetune.model.base.weight_files import written


def write_merged(model: PreTrainedModel, source: Path, adapter: Path, target: Path, where: str) -> None:
    """Writes weights (unless they are on the meta device), the small files, and the base's config with the adapter's changes."""
    config = read_json(source / "config.json")
    section = config if "vocab_size" in config else config.get("text_config", config)
    rows = model.config.get_text_config().vocab_size
    has_own_vocabulary = rows != section.get("vocab_size", rows)
    if not files.has_tokenizer(adapter) and (has_own_vocabulary or not files.has_tokenizer(source)):
        raise no_tokenizer(where, adapter)
    if has_own_vocabulary:
        section["vocab_size"] = rows
    config["tie_word_embeddings"] = model.config.tie_word_embeddings
    if model.device.type != "meta":
        # The base's own may be one that refuses to be saved; its file is copied below.
        model.generation_config = GenerationConfig.from_model_config(model.config)
        with quiet(), written():
            model.save_pretrained(target)
        (target / "generation_config.json").unlink()
    files.copy_small_files(source, adapter, target)
    (target / "config.json").write_text(json.dumps(with_dtype(config, torch.float32), indent=2) + "\n")
