"""Text that was damaged on its way: undecodable bytes, halves of characters, and UTF-8 that was read as another encoding."""

import re
import unicodedata
from collections.abc import Iterator

from finetune.data.checks.looked import Looked, shown

BROKEN = re.compile("[\ufffd\ud800-\udfff\x00-\x08\x0b\x0e-\x1f\x7f-\x84\x86-\x9f\ufdd0-\ufdef\ufffe\uffff]")
NAMES = {"\ufffd": "a replacement character, where bytes could not be decoded", "\0": "a zero byte"}
ESCAPES = re.compile("\x1b\\[[0-9;]*[A-Za-z]")
MOST_EXPLAINED = 100  # wrong words of a text that are looked for in their right form
AROUND = 12  # characters beside a finding in a message

# Readings of UTF-8 as a code page. Runs are at least as long as given: shorter ones also stand in good text.
CODE_PAGES = (("cp1252", 1), ("latin-1", 1), ("cp1251", 3), ("cp1250", 2), ("mac_roman", 1), ("cp437", 2))
# A closing quote or a dash after a capital letter is good text in several languages.
CLOSING = "»”’“‘…›—–™«„‚‹"
CANDIDATES = {
    page: re.compile(
        "(?:[{0}][{3}]|[{1}][{3}]{{2}}|[{2}][{3}]{{3}})+".format(
            *(
                "".join(re.escape(bytes([byte]).decode(page, "ignore")) for byte in part)
                for part in (range(0xC2, 0xE0), range(0xE1, 0xF0), range(0xF0, 0xF5), range(0x80, 0xC0))
            )
        )
    )
    for page, _ in CODE_PAGES
}

WORD_BEFORE, WORD_AFTER = re.compile(r"\w{1,30}\Z"), re.compile(r"\w{0,30}")


def broken(looked: Looked) -> Iterator[str]:
    for part in looked.parts:
        if not (match := BROKEN.search(part.text)):
            continue
        sign = match[0]
        if ESCAPES.match(part.text, match.start()):
            yield f"`{part.place}` has terminal escapes, like {shown(_around(part.text, match))}"
        elif "\ud800" <= sign <= "\udfff":
            yield f"`{part.place}` has half of a pair of surrogates, U+{ord(sign):04X}"
        else:
            name = NAMES.get(sign, f"the control character U+{ord(sign):04X}")
            yield f"`{part.place}` has {name}: {shown(_around(part.text, match))}"


def mojibake(looked: Looked) -> Iterator[str]:
    for part in looked.parts:
        if not part.text.isascii() and (found := double_encoded(part.text)):
            wrong, right = found
            yield f"`{part.place}` has UTF-8 that was read as another encoding: {shown(wrong)} is {shown(right)}"


def double_encoded(text: str) -> tuple[str, str] | None:
    """The first stretch that is UTF-8 read as a code page, and what it was; None where there is none."""
    for page, least in CODE_PAGES:
        doubtful = explained = 0
        for match in CANDIDATES[page].finditer(text):
            right = _decoded(match[0], page)
            if right is None or len(right) < least:
                continue
            if len(match[0]) == 2 and match[0][1] in CLOSING:
                doubtful += 1
                if doubtful < 3:
                    continue
            if not _is_explained(text, match, right):
                return match[0], right
            explained += 1
            if explained == MOST_EXPLAINED:
                break
    return None


def _is_explained(text: str, match: re.Match[str], right: str) -> bool:
    """Whether the text has the right word as well: it is about encodings then."""
    before, after = (
        WORD_BEFORE.search(text, max(0, match.start() - 30), match.start()),
        WORD_AFTER.match(text, match.end()),
    )
    word = f"{before[0] if before else ''}{right}{after[0] if after else ''}"
    return len(word) > len(right) and word in text


def _decoded(text: str, page: str) -> str | None:
    """What the bytes are as UTF-8, if that is text a person writes."""
    try:
        right = text.encode(page).decode()
    except UnicodeError:
        return None
    is_text = all(sign in USUAL or _is_usual(sign) for sign in right)
    return right if is_text else None


USUAL = set("‘’“”–—…•€™‐‑«»¡¿°§©®£¥\u00a0·×÷±²³½¼¾´¨→←✓✔★●→■■─│≤≥≠∞\u200b\ufeff")


def _is_usual(sign: str) -> bool:
    """Letters of the scripts that are often read wrongly, and emoji."""
    number = ord(sign)
    is_letter = unicodedata.category(sign) in ("Lu", "Ll", "Lo", "Lm")
    if is_letter:
        return (
            0xC0 <= number < 0x180
            or 0x370 <= number < 0x530
            or 0x590 <= number < 0x700
            or 0x900 <= number < 0xE80
            or 0x3040 <= number
        )
    return (
        0x1F300 <= number < 0x1FB00
        or 0x3000 <= number < 0x3020
        or 0xFF00 <= number < 0xFF70
        or 0x2600 <= number < 0x27C0
    )


def _around(text: str, match: re.Match[str]) -> str:
    return text[max(0, match.start() - AROUND) : match.end() + AROUND]
