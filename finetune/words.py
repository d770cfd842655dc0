"""Floor 0. Numbers in sentences."""

UNITS = ((86_400, "day"), (3_600, "hour"), (60, "minute"), (1, "second"))


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """`1 commit`, `2 commits`, `12,000 steps`; `plural` where it is not the noun with an s."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def duration(seconds: float) -> str:
    """`12 seconds`, `3 minutes`, `2 days`: in the largest unit of which there are two, or the smallest."""
    size, unit = next((each for each in UNITS if seconds >= 2 * each[0]), UNITS[-1])
    return counted(round(seconds / size), unit)
