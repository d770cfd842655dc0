"""A program, `python probe.py DIRECTORY OUT THREADS BASE CLASS`: logits and facts of a model, trained or packaged.

The same lines look at both sides. It must import nothing of finetune: a package has to load anywhere.
"""

import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, TypedDict, cast

import torch
import transformers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

QUESTION = [{"role": "user", "content": "What is a checkpoint good for?"}]
TEXTS = (
    "Hello, world!",
    "  two  blanks\tand a tab\n",
    "naïve café, 東京, 🙂",
    "def f(x):\n    return x ** 2",
    "1234567890 <|x|> </s>",
)
SEQUENCES, LENGTH = 4, 64
DAY = datetime(2024, 7, 26)
"""The date for templates that print one: a package must compute the same on every day."""


def logits(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    """fp32 logits of a fixed batch, and of a rendered question if there is a chat template."""
    inputs = {"batch": batch(model.config)}
    if isinstance(tokenizer.chat_template, str):
        with on_the_day(tokenizer.chat_template):
            rendered: Any = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt")
        inputs["question"] = rendered["input_ids"]
    with torch.inference_mode():
        return {name: model(input_ids=ids, use_cache=False).logits.float() for name, ids in inputs.items()}


@contextmanager
def on_the_day(template: str) -> Iterator[None]:
    """Inside, templates print `DAY`, whatever the clock says."""
    # transformers caches the compiled template by its text, and takes no function as a variable
    globals_of = transformers.utils.chat_template_utils._compile_jinja_template(template).globals
    globals_of["strftime_now"] = DAY.strftime
    try:
        yield
    finally:
        globals_of.pop("strftime_now", None)


def batch(config: PreTrainedConfig) -> Tensor:
    """Token ids from the size of the vocabulary alone, spread over all of it (Knuth's multiplicative hash)."""
    text = config.get_text_config()
    longest = getattr(text, "max_position_embeddings", None) or LENGTH
    length = min(LENGTH, longest) if longest > 0 else LENGTH  # XLNet's -1 means no bound
    return (torch.arange(SEQUENCES * length) * 2_654_435_761 % text.vocab_size).reshape(SEQUENCES, length)


class TokenizerFacts(TypedDict):
    size: int
    special: dict[str, Any]
    ids: list[list[int]]


class TemplateFacts(TypedDict):
    source: Any
    rendered: Any


class Facts(TypedDict):
    """Everything about model and tokenizer that must survive packaging: bytes of every tensor, ids, template."""

    weights: dict[str, str]
    tied: list[list[str]]
    tokenizer: TokenizerFacts
    template: TemplateFacts
    vocabulary: int


Keys = dict[str, list[str]]
"""What the files and a class do not have in common, by kind."""
Declared = TypedDict("Declared", {"class": str, "keys": Keys, "apart": float, "largest": float})
"""Of the class that the config declares: how far its logits are apart from the causal LM's, and the largest of these."""
_Loading = TypedDict("_Loading", {"class": str, "keys": Keys, "declared": Declared | None})


class LoadedFacts(Facts, _Loading):
    """The same of a package, and how it was loaded."""


def facts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Facts:
    state = model.state_dict()
    by_place: dict[int, list[str]] = {}
    for name, tensor in state.items():
        by_place.setdefault(tensor.data_ptr(), []).append(name)
    rendered = None
    if isinstance(tokenizer.chat_template, str):  # several without a default render nothing
        with on_the_day(tokenizer.chat_template):
            rendered = tokenizer.apply_chat_template(QUESTION, tokenize=False)
    return {
        "weights": {name: digest(tensor) for name, tensor in state.items()},
        "tied": sorted(names for names in by_place.values() if len(names) > 1),
        "tokenizer": {
            "size": len(tokenizer),
            "special": tokenizer.special_tokens_map,
            "ids": tokenizer(list(TEXTS))["input_ids"],
        },
        "template": {"source": tokenizer.chat_template, "rendered": rendered},
        "vocabulary": model.config.get_text_config().vocab_size,
    }


def digest(tensor: Tensor) -> str:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{tensor.dtype} {list(tensor.shape)} {hashlib.sha256(data.data).hexdigest()}"


def look(
    directory: Path, base: Path | None = None, trained: str | None = None
) -> tuple[dict[str, Tensor], LoadedFacts]:
    """Logits and facts of the model in a directory; with a base, the directory has an adapter of it.

    A model is loaded by the class that was trained, by default a causal LM, and also by the one in its config if that differs.
    """
    model_class = getattr(transformers, trained) if trained else AutoModelForCausalLM
    if base:
        from peft import PeftModel

        model, info = _loaded(model_class, base, dtype=torch.float32)
        model = cast(PreTrainedModel, PeftModel.from_pretrained(model, directory).eval())
    else:
        model, info = _loaded(model_class, directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    seen = logits(model, tokenizer)
    found: LoadedFacts = {
        "keys": _keys(info),
        **facts(model, tokenizer),
        "class": type(model).__name__,
        "declared": None,
    }
    declared = None if base else declared_class(directory)
    if declared and declared is not type(model):
        del model
        model, info = _loaded(declared, directory)
        other = logits(model, tokenizer)
        apart = max((seen[name] - other[name]).abs().max().item() for name in seen)
        largest = max(one.abs().max().item() for one in seen.values())
        found["declared"] = {"class": declared.__name__, "keys": _keys(info), "apart": apart, "largest": largest}
    return seen, found


def _loaded(
    model_class: type[AutoModelForCausalLM] | type[PreTrainedModel], directory: Path, **options: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model, and what transformers says of how its weights fit."""
    # a pair, which the signature does not say
    pair: Any = model_class.from_pretrained(directory, use_safetensors=True, output_loading_info=True, **options)
    return pair


def declared_class(directory: Path) -> type[PreTrainedModel] | None:
    """The class that a config declares; None if it declares none, or one unknown to this transformers."""
    named = json.loads(Path(directory, "config.json").read_bytes()).get("architectures") or [None]
    return getattr(transformers, str(named[0]), None)


def _keys(info: dict[str, Any]) -> Keys:
    return {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}


def main(directory: str, out: str, threads: str, base: str = "", trained: str = "") -> None:
    """Writes logits.safetensors and facts.json to `out`."""
    from safetensors.torch import save_file

    torch.set_num_threads(int(threads))
    seen, found = look(Path(directory), Path(base) if base else None, trained)
    save_file(seen, Path(out, "logits.safetensors"))
    Path(out, "facts.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
