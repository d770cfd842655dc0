"""The built-in chat templates, by name: a file for each beside this one. Each renders a turn alike with and without later turns.

They are for bases without a template. A turn of the assistant ends with the format's end token, or with the base's where it has none.
"""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BEGIN, END = "bos_token", "eos_token"
"""Stand for the base's own begin and end token."""
TOKENS: Mapping[str, tuple[str, ...]] = {
    "alpaca": (END,),
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "deepseek": (BEGIN, "<｜User｜>", "<｜Assistant｜>", END),
    "gemma": (BEGIN, "<start_of_turn>", "<end_of_turn>"),
    "granite": ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"),
    "llama2": (BEGIN, END),
    "llama3": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "mistral": (BEGIN, END),
    "mistral-v7": (
        *(BEGIN, "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
        *("[TOOL_CALLS]", "[ARGS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", END),
    ),
    "phi3": ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    "phi4": ("<|im_start|>", "<|im_sep|>", "<|im_end|>"),
    "plain": (END,),
    "plain-lines": (END,),
    "tulu": (END,),
    "vicuna": (END,),
    "zephyr": (END,),
}
"""The tokens that each writes as such. Other markers, like `[INST]` of `mistral`, may be plain text to the tokenizer."""
NAMES = tuple(TOKENS)


@cache
def text_of(name: str) -> str:
    """The built-in template of this name; KeyError without one."""
    if name not in TOKENS:
        raise KeyError(name)
    return (Path(__file__).parent / f"{name}.jinja").read_text(encoding="utf-8").removesuffix("\n")


def missing_from(tokenizer: "PreTrainedTokenizerBase", name: str) -> list[str]:
    """The tokens of a built-in template that the tokenizer lacks: it would write them as several tokens of plain text."""
    known = tokenizer.get_vocab()
    own = {BEGIN: tokenizer.bos_token, END: tokenizer.eos_token}
    return [token for token in TOKENS[name] if own.get(token, token) not in known]


def refuse_missing(tokenizer: "PreTrainedTokenizerBase", name: str) -> None:
    """Raises DataError if the tokenizer lacks a token of the built-in template, and says which templates it has all tokens of."""
    if not (missing := missing_from(tokenizer, name)):
        return
    said = ", ".join({BEGIN: "a begin token", END: "an end token"}.get(token, f"`{token}`") for token in missing)
    able = ", ".join(other for other in NAMES if not missing_from(tokenizer, other)) or "none of the built-in ones"
    message = f"the base's tokenizer lacks tokens of the template `{name}`: {said}"
    raise DataError(message, where="task.template", hint=f"it has all tokens of: {able}")
