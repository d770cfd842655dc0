"""The column `history`: the questions and answers before the last ones, of rows with one column for each."""

from finetune.data.conversation import kind_of
from finetune.data.example import Row
from finetune.data.shapes.shape import listed
from finetune.errors import DataError


def after(history: object, question: str, answer: str, where: str) -> Row:
    """The canonical columns of a question and its answer after a history. All answers are learnt."""
    if before := _turns(history, where):
        last = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return {"messages": [*before, *last]}
    return {"prompt": question, "completion": answer}


def _turns(value: object, where: str) -> list[Row]:
    """The earlier questions and answers as messages."""
    pairs = listed(value)
    if pairs is None or pairs == "" or pairs == []:
        return []
    if not isinstance(pairs, list):
        raise DataError(f"`history` must be a list of [question, answer], not {kind_of(pairs)}", where=where)
    made: list[Row] = []
    for number, pair in enumerate(pairs):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(each, str) for each in pair):
            raise DataError(f"`history[{number}]` must be [question, answer], both text", where=where)
        made += [{"role": role, "content": text} for role, text in zip(("user", "assistant"), pair, strict=True)]
    return made
