"""The marks that open and close a thought or a channel, by their grammar: `<think>…</think>`, `<|channel>…<channel|>`, `[THINK]…[/THINK]`.

Templates invent the names. The brackets are what they have in common.
"""

import re

# What opens -> what closes it.
PAIRS = (
    (re.compile(r"<([A-Za-z_][\w.:-]*)>"), "</{}>"),
    (re.compile(r"<\|begin_of_(\w+)\|>"), "<|end_of_{}|>"),
    (re.compile(r"<\|(\w+)>"), "<{}|>"),
    (re.compile(r"\[([A-Z_]+)\]"), "[/{}]"),
    (re.compile(r"◁(\w+)▷"), "◁/{}▷"),
)
CLOSING = re.compile(r"</[\w.:-]+>|<\|end_of_\w+\|>|<\w+\|>|\[/[A-Z_]+\]|◁/\w+▷")
UNFINISHED = re.compile(r"[<\[◁][^<>\[\]◁▷\s]*\Z")
MARKS = re.compile("|".join([*(opening.pattern for opening, _ in PAIRS), CLOSING.pattern, r"\s"]))


def follows(asked: str, same: int, written: str) -> str | None:
    """What a model writes after a generation prompt that is not how its turn begins; None if the turn does not fit the prompt.

    `asked` is the generation prompt. The turn has its first `same` characters too, and then `written`.
    """
    if unfinished := UNFINISHED.search(asked, 0, same):  # a mark that both begin alike is not shared
        written, same = asked[unfinished.start() : same] + written, unfinished.start()
    shared, more = asked[:same], asked[same:]
    if not more.strip():
        return written
    closings = CLOSING.findall(more)
    if not closings and not _opened(more):
        return None  # not a thought
    if any(closing not in written for closing in _opened(more)):
        return None  # the thought stays open
    for closing in closings:
        if closing in _opened(shared) and closing in written:
            # The prompt ended the thought that the turn begins with: an empty one of the turn ends in the same way.
            if not written.lstrip().startswith(closing):
                return None
            written = written.lstrip().removeprefix(closing)
    return written


def _opened(text: str) -> list[str]:
    """What would close the thoughts that a text leaves open."""
    found = [(match, closing.format(match[1])) for opening, closing in PAIRS for match in opening.finditer(text)]
    return [closing for match, closing in found if closing not in text[match.end() :]]


def begin_of_marks(text: str, end: int) -> int:
    """Where the marks and blanks begin that stand right before `end`."""
    begin = end
    while found := re.search(rf"(?:{MARKS.pattern})\Z", text[:begin][-200:]):
        begin -= len(found[0])
    return begin
