"""Pins a base, finds it again, and loads it."""

from finetune.model.base.files import Companions, has_tokenizer, read_ahead, tokenizer_files
from finetune.model.base.foreign import refuse as refuse_foreign
from finetune.model.base.likeness import difference
from finetune.model.base.load import (
    DTYPES,
    STORED_DTYPES,
    Place,
    check_quantization,
    empty_model,
    load_config,
    load_model,
)
from finetune.model.base.located import located
from finetune.model.base.outline import with_dtype
from finetune.model.base.pinning import LOOK, attach, beneath, directory, pin, refuse_damaged
from finetune.model.base.small_files import small_files_of, tokenizer_directory
from finetune.model.base.stored import lacking, load_as_stored
from finetune.model.base.tokenizer import check_generation_config, load_tokenizer, named_stops, stop_tokens
from finetune.model.base.unquantized import refuse_unquantized
from finetune.model.base.weight_files import check_weight_files, refuse_lacking
from finetune.store.checkpoints.refs import run_around

__all__ = [
    "DTYPES",
    "LOOK",
    "STORED_DTYPES",
    "Companions",
    "Place",
    "attach",
    "beneath",
    "check_generation_config",
    "check_quantization",
    "check_weight_files",
    "difference",
    "directory",
    "empty_model",
    "has_tokenizer",
    "lacking",
    "load_as_stored",
    "load_config",
    "load_model",
    "load_tokenizer",
    "located",
    "pin",
    "read_ahead",
    "refuse_damaged",
    "refuse_foreign",
    "refuse_lacking",
    "refuse_unquantized",
    "run_around",
    "small_files_of",
    "named_stops",
    "stop_tokens",
    "tokenizer_directory",
    "tokenizer_files",
    "with_dtype",
]
