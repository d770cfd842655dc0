"""Text of rows for a terminal: nothing in it moves the cursor, changes colours, or hides."""

SIGNS = {"\n": "↵\n", "\t": "→", "\u00a0": "⍽", "\r": "␍", "\x7f": "␡"}
# They change what is seen, or how: of no width, or they turn the order of the text.
HIDDEN: tuple[str, ...] = (
    *("\u00ad", "\u034f", "\u061c", "\u200b\u200f", "\u2028\u202e", "\u2060\u206f", "\ufeff", "\ufff9\ufffb"),
    *("\x80\x9f", "\ud800\udfff", "\U000e0000\U000e007f"),
)


def visible(text: str, start: int = 0, end: int | None = None) -> str:
    """A piece of a text, without what would move the cursor, change colors, or not be seen."""
    end = len(text) if end is None else end
    return "".join(_sign(text, place) for place in range(start, end))


def _sign(text: str, place: int) -> str:
    sign = text[place]
    if sign == " ":
        is_between = 0 < place < len(text) - 1 and not (text[place - 1].isspace() or text[place + 1].isspace())
        return sign if is_between else "·"
    if sign in SIGNS:
        return SIGNS[sign]
    if sign < " ":
        return chr(0x2400 + ord(sign))
    if any(span[0] <= sign <= span[-1] for span in HIDDEN):
        return f"⟨U+{ord(sign):04X}⟩"
    return sign
