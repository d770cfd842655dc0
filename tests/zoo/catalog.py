"""Templates that behave as those of today's models do, each written for these tests, with a tokenizer that has its tokens.

A file in `templates/` has a head in YAML, a line of four dashes, and the template. Keys of the head: `about` (its behaviours), `eos`, `bos`,
`stops` (tokens that end generation), `special` and `plain` (added tokens; text may spell the plain ones), `variables` of the template,
`marks: wrong` for generation marks that are wrong on purpose, and `like`: the rest is that of another file.
"""

import copy
import functools
from pathlib import Path
from typing import Any, NamedTuple

import yaml

FILES = Path(__file__).parent / "templates"


class Specimen(NamedTuple):
    name: str
    about: str
    template: str
    eos: str
    stops: list[str]
    special: list[str]
    plain: list[str]
    bos: str | None
    variables: dict[str, Any]
    has_wrong_marks: bool

    @property
    def has_marks(self) -> bool:
        return "{%- generation" in self.template

    @property
    def tokenizer(self):
        return tokenizer_with(tuple(self.special), tuple(self.plain), self.bos, self.eos)

    @property
    def tokenizer_with_template(self):
        tokenizer = copy.copy(self.tokenizer)
        tokenizer.chat_template = self.template
        return tokenizer

    @property
    def stop_ids(self) -> set[int]:
        return {*self.tokenizer.convert_tokens_to_ids(self.stops)}


def _specimen(name: str) -> Specimen:
    head, _, template = (FILES / f"{name}.jinja").read_text().partition("----\n")
    given = yaml.safe_load(head)
    if "like" in given:
        return _specimen(given["like"])._replace(name=name, about=given["about"], variables=given["variables"])
    return Specimen(
        name=name,
        about=given["about"],
        template=template,
        eos=given["eos"],
        stops=given["stops"],
        special=given["special"],
        plain=given.get("plain", []),
        bos=given.get("bos"),
        variables=given.get("variables", {}),
        has_wrong_marks=given.get("marks") == "wrong",
    )


@functools.cache
def _bytes_only() -> str:
    """A tokenizer of single bytes, as JSON."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("i", "n"), ("Ġ", "the"), ("a", "n"), ("Ġ", "a"), ("e", "r"), (":", "Ġ")]
    words = alphabet + [first + second for first, second in merges]
    tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer.to_str()


@functools.cache
def tokenizer_with(special: tuple[str, ...], plain: tuple[str, ...] = (), bos: str | None = None, eos: str = "</s>"):
    """A byte-level tokenizer with a few merges and these added tokens. A begin token it puts before each text, if not told otherwise."""
    from tokenizers import AddedToken, Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer.from_str(_bytes_only())
    tokenizer.add_special_tokens([AddedToken(each, special=True, normalized=False) for each in special])
    tokenizer.add_tokens([AddedToken(each, special=False, normalized=False) for each in plain])
    if bos is not None:
        begin = [(bos, tokenizer.token_to_id(bos))]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos}:0 $A:0", special_tokens=begin)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos)


ZOO = {path.stem: _specimen(path.stem) for path in sorted(FILES.glob("*.jinja"))}
