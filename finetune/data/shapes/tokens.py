"""Rows that are tokens already: `input_ids`, with `labels` (-100 is without a loss) or a mask of ones and zeros.

The row for the task has `input_ids`, and `labels` only where some token has no loss.
"""

from finetune.data.conversation import kind_of
from finetune.data.example import Row
from finetune.data.shapes.shape import Shape, listed, refuse, replaced
from finetune.errors import DataError

NO_LOSS = -100  # as torch's cross-entropy has it
MASKS = ("loss_mask", "completion_mask", "assistant_masks", "assistant_mask")
LARGEST = 2**31 - 1


def fits(row: Row) -> bool:
    ids = listed(row.get("input_ids"))
    return isinstance(ids, list) and len(ids) > 0 and row.get("text") is None


def canonical(row: Row, where: str) -> Row:
    ids = _numbers(row, "input_ids", range(LARGEST + 1), where)
    if ids is None:
        refuse("tokens", row, "`input_ids` is null" if "input_ids" in row else "it has no `input_ids`", where)
    if not ids:
        raise DataError("`input_ids` is an empty list", where=where, hint="remove the row")
    masks = [name for name in MASKS if row.get(name) is not None]
    if len(masks) + (row.get("labels") is not None) > 1:
        named = " and ".join(f"`{name}`" for name in [*masks, "labels"][:2])
        raise DataError(f"has {named}: each says which tokens have a loss", where=where, hint="skip one of them")
    labels = _labels(row, ids, where)
    for name in masks:
        mask = _of_length(row, name, range(2), len(ids), where) or []
        labels = [each if is_learnt else NO_LOSS for each, is_learnt in zip(ids, mask, strict=True)]
    start, end = _without_padding(row, len(ids), where)
    ids, labels = ids[start:end], labels[start:end]
    if not any(label != NO_LOSS for label in labels[1:]):
        raise DataError("has no token with a loss: all are masked", where=where, hint="remove the row")
    made: Row = {"input_ids": ids}
    if labels != ids:
        made["labels"] = labels
    return replaced(row, ("input_ids", "labels", "attention_mask", *MASKS), made, "text", where)


def _labels(row: Row, ids: list[int], where: str) -> list[int]:
    labels = _of_length(row, "labels", range(NO_LOSS, LARGEST + 1), len(ids), where)
    if labels is None:
        return ids
    for number, (label, token) in enumerate(zip(labels, ids, strict=True)):
        if label != token and label != NO_LOSS:
            hint = "a label is the token in its own place, or -100 for no loss; it is not shifted"
            raise DataError(f"`labels[{number}]` is {label}, and the token there is {token}", where=where, hint=hint)
    return labels


def _without_padding(row: Row, count: int, where: str) -> tuple[int, int]:
    """The first token, and the one after the last, by `attention_mask`: zeros before and after are padding."""
    mask = _of_length(row, "attention_mask", range(2), count, where)
    if mask is None:
        return 0, count
    ones = [number for number, each in enumerate(mask) if each]
    if not ones or ones[-1] - ones[0] + 1 != len(ones):
        message = "`attention_mask` hides all tokens" if not ones else "`attention_mask` hides tokens within the row"
        raise DataError(message, where=where, hint="only padding before or after the row is read")
    return ones[0], ones[-1] + 1


def _of_length(row: Row, column: str, known: range, count: int, where: str) -> list[int] | None:
    numbers = _numbers(row, column, known, where)
    if numbers is not None and len(numbers) != count:
        raise DataError(f"`{column}` has {len(numbers)} items, and `input_ids` has {count}", where=where)
    return numbers


def _numbers(row: Row, column: str, known: range, where: str) -> list[int] | None:
    """The whole numbers of a column, true and false as 1 and 0; None for null or no column."""
    value = listed(row.get(column))
    if value is None:
        return None
    if not isinstance(value, list):
        raise DataError(f"`{column}` must be a list of whole numbers, not {kind_of(value)}", where=where)
    kinds = {*map(type, value)}
    if kinds == {int} and min(value) >= known[0] and max(value) <= known[-1]:
        return value  # the usual case, without a look at each by itself: rows have thousands
    for number, each in enumerate(value):
        if not isinstance(each, int) or each not in known:
            said = f"{each}" if isinstance(each, int) else kind_of(each)
            said = said if len(said) < 30 else f"{said[:30]}…"
            raise DataError(
                f"`{column}[{number}]` is {said}, not a whole number from {known[0]} to {known[-1]}", where=where
            )
    return [int(each) for each in value]


SHAPE = Shape("text", fits, canonical)
