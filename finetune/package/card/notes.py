"""Keeps people's text when a card is rewritten: above it, in its notes, below it, and keys of its front matter.

The first line of a card has a digest of the generated part, so a change in there is noticed.
"""

import hashlib
import json
import re
from dataclasses import dataclass, replace

from finetune.package.card import metadata
from finetune.package.card.metadata import FrontMatter
from finetune.recipe.load import to_yaml
from finetune.recipe.schema import adapters, tasks
from finetune.recipe.schema.adapters import AdapterFacts
from finetune.recipe.schema.tasks import TaskFacts

NOTES_BEGIN = "<!-- notes: what stands between these two lines stays when the card is written again -->"
NOTES_END = "<!-- /notes -->"
BEGIN = re.compile(r"<!-- card ([0-9a-f]{16}): .*? -->\n")
SAID = "written by finetune from here to the notes; what you write above this line stays"
KEYS = (
    *("license", "license_name", "license_link", "library_name", "pipeline_tag", "base_model", "base_model_relation"),
    *("datasets", "model-index", "tags"),
)
GATE = "extra_gated_"
_MEMBERS: tuple[type[AdapterFacts] | type[TaskFacts], ...] = (*adapters.SECTIONS.values(), *tasks.SECTIONS.values())
TAGS = {"finetune", *(tag for member in _MEMBERS for tag in member.tags)}


@dataclass(frozen=True)
class Parts:
    """A card, cut at its marks; joined, the parts give the text again."""

    front: str
    above: str
    begin: str
    body: str
    notes: str | None
    """The notes with their marks; None in a card without marks."""
    below: str

    @property
    def keys(self) -> FrontMatter:
        return metadata.read(self.front) or {}

    @property
    def digest(self) -> str:
        ours = {key: value for key, value in self.keys.items() if _is_ours(key) and key != "tags"}
        facts = json.dumps([ours, self.body], sort_keys=True, default=str)
        return hashlib.sha256(facts.encode()).hexdigest()[:16]

    def __str__(self) -> str:
        return "".join((self.front, self.above, self.begin, self.body, self.notes or "", self.below))


def marked(text: str) -> str:
    """A card with the first line of its generated part."""
    parts = replace(parts_of(text), above="\n")
    parts = replace(parts, body="\n" + parts.body.lstrip("\n"))
    return str(replace(parts, begin=f"<!-- card {parts.digest}: {SAID} -->\n"))


def parts_of(text: str) -> Parts:
    match = metadata.FRONT_MATTER.match(text)
    front = text[: match.end()].rstrip("\n") + "\n" if match else ""
    rest = text[len(front) :]
    marks = re.search(f"{re.escape(NOTES_BEGIN)}\n.*?{re.escape(NOTES_END)}", rest, re.DOTALL)
    if marks is None:
        return Parts(front, "", "", rest, None, "")
    body, below = rest[: marks.start()], rest[marks.end() :]
    begin = BEGIN.search(body)
    if begin is None:
        return Parts(front, "", "", body, marks[0], below)
    return Parts(front, body[: begin.start()], begin[0], body[begin.end() :], marks[0], below)


def with_text_of(earlier: str, text: str) -> tuple[str, bool]:
    """A card with people's text from an earlier one, and whether some of their text is lost anyway."""
    old, new = parts_of(earlier), parts_of(text)
    if old.notes is None:
        return text, bool(old.body.strip()) or _would_lose(old.keys, new.keys)
    if new.notes is None:
        empty = f"{NOTES_BEGIN}\n{NOTES_END}"
        return text, bool((old.above + old.below).strip()) or old.notes != empty
    match = BEGIN.match(old.begin)
    is_edited = match is not None and match[1] != old.digest
    above = old.above if old.begin else new.above
    front = _front(old, new)
    return str(replace(old, front=front, above=above, begin=new.begin, body=new.body)), is_edited


def _front(old: Parts, new: Parts) -> str:
    """The new front matter, with the keys and the tags that people added."""
    was, now = old.keys, new.keys
    added = {key: value for key, value in was.items() if not _is_ours(key)}
    tags = [*_tags(now), *(tag for tag in _tags(was) if tag not in (*_tags(now), *TAGS))]
    if not added and tags == _tags(now):
        return new.front
    return f"---\n{to_yaml(now | ({'tags': tags} if tags else {}) | added)}---\n"


def _would_lose(was: FrontMatter, now: FrontMatter) -> bool:
    """Whether a card is front matter alone, as the Hub makes it for a licence."""
    return any(now.get(key) != value for key, value in was.items())


def _tags(keys: FrontMatter) -> list[str]:
    tags = keys.get("tags") or []
    return [tags] if isinstance(tags, str) else list(tags)


def _is_ours(key: str) -> bool:
    return key in KEYS or key.startswith(GATE)
