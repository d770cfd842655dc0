"""The words of refusals: many refused rows or files are one error, with each kind once, its first places and its count."""

from collections.abc import Iterable, Sequence

from finetune.errors import DataError

MOST_KINDS = 8
MOST_PLACES = 5


def together(errors: Sequence[DataError], seen: int | None = None) -> DataError:
    """One error for one or several, in their order, kept as its `parts`. `seen` is the number of checked rows."""
    if len(errors) == 1:
        [only] = errors
        # With its part: the caller may join it with the refusals of other shards.
        return DataError(only.message, where=only.where, hint=only.hint, parts=errors)
    kinds: dict[str, list[DataError]] = {}
    for error in errors:
        kinds.setdefault(error.message, []).append(error)
    lines: list[str] = []
    for message, [first, *others] in list(kinds.items())[:MOST_KINDS]:
        # The first place is the `where` of the error itself.
        lines.append(f"{first.where}: {message}" if lines else message)
        if others:
            more = f" and {len(others) - MOST_PLACES:,} more" if len(others) > MOST_PLACES else ""
            lines.append(f"  also {', '.join(str(other.where) for other in others[:MOST_PLACES])}{more}")
    if len(kinds) > MOST_KINDS:
        lines.append(f"and {len(kinds) - MOST_KINDS:,} more messages")
    if seen is not None:
        lines.append(f"{len(errors):,} of {seen:,} rows are refused")
    shown = [error for same in list(kinds.values())[:MOST_KINDS] for error in same]
    hints = dict.fromkeys(error.hint for error in shown if error.hint)
    return DataError("\n".join(lines), where=errors[0].where, hint="; ".join(hints) or None, parts=errors)


def first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".")


def listed(columns: Iterable[str]) -> str:
    return ", ".join(f"`{column}`" for column in columns)
