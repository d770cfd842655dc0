"""What rows are, without a judgement: lengths, languages, roles and tools."""

import re
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TypedDict

import numpy as np

from finetune.data.checks.conversations import calls, tool_names
from finetune.data.checks.looked import Looked, Part

SHARES = (0, 5, 25, 50, 75, 95, 99, 100)
BINS = 10  # of the picture
WIDTH = 40
MOST_NAMES = 50  # of tools, of roles and of languages
LEAST_WORDS = 8  # of a text whose language is looked for
LOOKED = 4000  # characters of a row in which it is

# Frequent words that few other languages have.
COMMON_WORDS: dict[str, str] = {
    "English": "the and of to is that it for was with this you are have not from",
    "German": "der die und das ist nicht ein eine zu mit den von auf für sich wird",
    "French": "le la les et des est une dans que pour pas qui sur vous avec ce",
    "Spanish": "el los las y que es una por con para del se como más pero está",
    "Portuguese": "o os as e que é uma não para com do da em como mais você",
    "Italian": "il gli che è una per non di con del della sono più come anche",
    "Dutch": "de het een en van is niet dat op te zijn met voor deze wordt",
    "Polish": "i w nie na się jest że do to z jak od przez oraz dla",
    "Turkish": "bir ve bu için ile da de çok olarak daha gibi ne olan",
    "Swedish": "och att det som en är på av för med inte den till har",
    "Indonesian": "yang dan di itu dengan untuk ini tidak dari dalam adalah pada",
    "Vietnamese": "và của là có không cho được một các những trong người này",
}
SCRIPTS: tuple[tuple[str, str], ...] = (
    ("Japanese", "\u3040-\u30ff"),
    ("Korean", "\uac00-\ud7af\u1100-\u11ff"),
    ("Chinese", "\u3400-\u4dbf\u4e00-\u9fff"),
    ("Cyrillic", "\u0400-\u052f"),
    ("Arabic", "\u0600-\u06ff\u0750-\u077f"),
    ("Hebrew", "\u0590-\u05ff"),
    ("Greek", "\u0370-\u03ff"),
    ("Devanagari", "\u0900-\u097f"),
    ("Thai", "\u0e00-\u0e7f"),
)
_SCRIPTS = tuple((name, re.compile(f"[{signs}]")) for name, signs in SCRIPTS)
_WORDS = {name: frozenset(words.split()) for name, words in COMMON_WORDS.items()}
_LETTER, _WORD = re.compile(r"[^\W\d_]"), re.compile(r"[^\W\d_]+")


class Spread(TypedDict):
    """Numbers at shares of the rows, in percent; and how many lie in each of some equal steps."""

    percentiles: dict[str, int]
    edges: list[int]
    counts: list[int]


class Language(TypedDict):
    rows: int
    first: str
    """Place of the first row."""


class Facts(TypedDict):
    tokens: Spread | None
    """Of each example, before it is cut."""
    learnt_tokens: Spread | None
    """After."""
    languages: dict[str, Language]
    roles: dict[str, int]
    tools: dict[str, int]
    """Calls of each."""
    offered_tools: dict[str, int]
    """Rows that offer each."""


class Counts:
    """Adds up the facts of all rows: 8 bytes an example."""

    def __init__(self) -> None:
        self._tokens, self._learnt = array("i"), array("i")
        self._languages: dict[str, Language] = {}
        self._roles: Counter[str] = Counter()
        self._tools: Counter[str] = Counter()
        self._offered: Counter[str] = Counter()

    def look(self, looked: Looked) -> None:
        for example in looked.examples:
            self._tokens.append(len(example.tokens) + example.cut_tokens)
            self._learnt.append(int(example.supervised[1:].sum()))
        if looked.parts:
            name = language_of(looked.parts)
            self._languages.setdefault(name, {"rows": 0, "first": looked.where})["rows"] += 1
        self._roles.update(part.role for part in looked.parts if part.place.endswith((".content", "system")))
        messages = looked.columns.get("messages")
        for message in messages if isinstance(messages, list) else ():
            if isinstance(message, dict):
                _add(self._tools, [name for name, _ in calls(message)])
        _add(self._offered, tool_names(looked.columns.get("tools")))

    def facts(self) -> Facts:
        languages = sorted(self._languages.items(), key=lambda pair: -pair[1]["rows"])
        return {
            "tokens": spread(np.array(self._tokens)),
            "learnt_tokens": spread(np.array(self._learnt)),
            "languages": dict(languages),
            "roles": dict(self._roles.most_common(MOST_NAMES)),
            "tools": dict(self._tools.most_common(MOST_NAMES)),
            "offered_tools": dict(self._offered.most_common(MOST_NAMES)),
        }


def _add(names: "Counter[str]", more: Iterable[str]) -> None:
    for name in more:
        if name in names or len(names) < 10 * MOST_NAMES:  # not a name for each row
            names[name] += 1


def language_of(parts: Sequence[Part]) -> str:
    """A guess: by script, and of Latin letters by frequent words. Code, names and short texts are `unknown`."""
    said = (part.text[:LOOKED] for part in parts if part.role in ("user", "assistant", "text"))
    text = "\n".join(said)[:LOOKED]
    letters = len(_LETTER.findall(text))
    for name, signs in _SCRIPTS:
        # Japanese has Chinese signs too, and a Chinese text quotes English names.
        if letters and len(signs.findall(text)) >= letters * (0.1 if name == "Japanese" else 0.3):
            return name
    words = _WORD.findall(text.lower())
    if len(words) < LEAST_WORDS:
        return "unknown"
    times = Counter(words)
    counts = {name: sum(times[word] for word in common if word in times) for name, common in _WORDS.items()}
    best = max(counts, key=counts.__getitem__)
    others = max(count for name, count in counts.items() if name != best)
    return best if counts[best] >= max(2, 0.04 * len(words)) and counts[best] > others else "unknown"


def spread(numbers: np.ndarray) -> Spread | None:
    if not len(numbers):
        return None
    at = np.percentile(numbers, SHARES, method="nearest")
    first, last = int(numbers.min()), int(numbers.max()) + 1
    counts, edges = np.histogram(numbers, min(BINS, last - first), (first, last))
    return {
        "percentiles": {str(share): int(value) for share, value in zip(SHARES, at, strict=True)},
        "edges": [round(float(edge)) for edge in edges],
        "counts": counts.tolist(),
    }


def picture(found: Spread) -> list[str]:
    """A bar for each step."""
    most = max(found["counts"])
    width = len(f"{found['edges'][-1]:,}")
    return [
        f"{first:>{width},} to {last:>{width},}  {'█' * -(-count * WIDTH // most)} {count:,}".rstrip()
        for first, last, count in zip(found["edges"], found["edges"][1:], found["counts"], strict=False)
    ]
