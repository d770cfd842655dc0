"""Markup that does not belong into text: control tokens, prompts of other formats, and entities of HTML."""

import re
from collections.abc import Iterator

import numpy as np

from finetune.data.checks.looked import Context, Found, Looked

# Control tokens of widespread templates, beside those of the base: in text they are leftovers of another rendering.
FOREIGN = re.compile(
    r"<\|(?:im_start|im_end|endoftext|begin_of_text|end_of_text|start_header_id|end_header_id|eot_id|eom_id|python_tag|user|"
    r"assistant|system|end|observation|start|channel|message|return|call|startoftext|end_of_turn\|?)\|>"
    r"|<(?:start_of_turn|end_of_turn)>|\[/?INST\]|<</?SYS>>|\[(?:AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS)\]"
    r"|<[｜|](?:begin▁of▁sentence|end▁of▁sentence|User|Assistant)[｜|]>"
)
PROMPTS = re.compile(
    r"^### (?:Instruction|Response|Input|Human|Assistant|User|System) ?:|^(?:Human|Assistant|USER|ASSISTANT): .*\n(?:.*\n)*?"
    r"(?:Human|Assistant|USER|ASSISTANT): |^Below is an instruction that describes a task",
    re.MULTILINE,
)
LOOKED = 100_000  # characters of a text in which prompts are looked for
ENTITIES = re.compile(r"&(?:amp|lt|gt|quot|nbsp|apos|#39|#x27|#8217|mdash|rsquo);")
DOUBLE = re.compile(r"&amp;(?:amp|lt|gt|quot|nbsp|#39|#x27);")


class ControlTokens:
    """Texts that spell a control token of the base's tokenizer."""

    def __init__(self, context: Context):
        names = sorted(context.control, key=len, reverse=True)
        self._names = re.compile("|".join(map(re.escape, names))) if names else None

    def look(self, looked: Looked) -> Iterator[Found]:
        for part in looked.parts if self._names else ():
            if self._names and (match := self._names.search(part.text)):
                yield Found(looked.row, looked.where, f"`{part.place}` spells the control token `{match[0]}`")

    def end(self, held_out: np.ndarray) -> Iterator[Found]:
        return iter(())


class ForeignTokens(ControlTokens):
    """Texts that spell a control token of another template."""

    def look(self, looked: Looked) -> Iterator[Found]:
        for part in looked.parts:
            for match in FOREIGN.finditer(part.text):
                if not (self._names and self._names.fullmatch(match[0])):
                    message = f"`{part.place}` spells `{match[0]}`, a control token of another template"
                    yield Found(looked.row, looked.where, message)
                    break


def prompts(looked: Looked) -> Iterator[str]:
    for part in looked.parts:
        if part.role != "text" and (match := PROMPTS.search(part.text[:LOOKED])):
            first = match[0].partition("\n")[0]
            yield f"`{part.place}` has the words of a prompt format: `{first[:40]}`"


def double_entities(looked: Looked) -> Iterator[str]:
    for part in looked.parts:
        if "&amp;" in part.text and (match := DOUBLE.search(part.text)):
            yield f"`{part.place}` was escaped for HTML twice: `{match[0]}`"


def entities(looked: Looked) -> Iterator[str]:
    for part in looked.parts:
        if "&" in part.text and not DOUBLE.search(part.text) and (match := ENTITIES.search(part.text)):
            yield f"`{part.place}` has an entity of HTML: `{match[0]}`"
