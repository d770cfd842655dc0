"""Pins a base, finds it again, and loads it."""

from finetune.model.base.by_rows import Unread, unread
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
from finetune.model.base.loading_class import LoadingClass, class_named, class_of, wide_class
from finetune.model.base.located import located
from finetune.model.base.merge import class_below
from finetune.model.base.native import notes
from finetune.model.base.outline import has_halves, with_dtype
from finetune.model.base.pinning import LOOK, attach, beneath, directory, pin, refuse_damaged
from finetune.model.base.rope import hint_for as rope_hint
from finetune.model.base.rope import positions_of, unscaled
from finetune.model.base.small_files import small_files_of, tokenizer_directory
from finetune.model.base.stored import lacking, load_as_stored
from finetune.model.base.text_side import beside_text, freeze_beside_text, parts_beside, refuse_mixed
from finetune.model.base.tokenizer import check_generation_config, load_tokenizer, named_stops, stop_tokens
from finetune.model.base.unquantized import refuse_unquantized
from finetune.model.base.view import source_of
from finetune.model.base.weight_files import check_weight_files, refuse_lacking
from finetune.store.checkpoints.refs import run_around

__all__ = [
    "DTYPES",
    "LOOK",
    "STORED_DTYPES",
    "Companions",
    "LoadingClass",
    "Place",
    "Unread",
    "attach",
    "beneath",
    "beside_text",
    "check_generation_config",
    "check_quantization",
    "check_weight_files",
    "class_below",
    "class_named",
    "class_of",
    "difference",
    "directory",
    "empty_model",
    "freeze_beside_text",
    "has_halves",
    "has_tokenizer",
    "lacking",
    "load_as_stored",
    "load_config",
    "load_model",
    "load_tokenizer",
    "located",
    "parts_beside",
    "pin",
    "positions_of",
    "read_ahead",
    "refuse_damaged",
    "refuse_foreign",
    "refuse_lacking",
    "refuse_mixed",
    "refuse_unquantized",
    "rope_hint",
    "run_around",
    "small_files_of",
    "source_of",
    "unread",
    "unscaled",
    "named_stops",
    "notes",
    "stop_tokens",
    "tokenizer_directory",
    "tokenizer_files",
    "wide_class",
    "with_dtype",
]
