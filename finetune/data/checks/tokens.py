"""What becomes of a row's tokens: refused, cut, or nothing learnt."""

from collections.abc import Iterator

from finetune.data.checks.looked import Looked
from finetune.errors import counted

TOO_LONG = 8 << 20  # characters of a row that is not tokenized here: each takes some 100 bytes of memory meanwhile


def refused(looked: Looked) -> Iterator[str]:
    if looked.refusal is not None:
        yield looked.refusal.message


def nothing_learnt(looked: Looked) -> Iterator[str]:
    learnt = sum(int(example.supervised[1:].sum()) for example in looked.examples)
    lost = sum(example.lost_targets for example in looked.examples)
    if not looked.examples or learnt:
        return
    if lost:
        yield f"task.max_length cuts the whole answer away: {counted(lost, 'learnt token')}"
    else:
        yield "no token of it is learnt"


def cut_answers(looked: Looked) -> Iterator[str]:
    for example in looked.examples:
        if example.lost_targets and example.supervised[1:].any():
            learnt = int(example.supervised[1:].sum()) + example.lost_targets
            message = f"task.max_length cuts {example.lost_targets:,} of {counted(learnt, 'learnt token')} away"
            yield f"{message}, the end of the answer among them"


def cut_rows(looked: Looked) -> Iterator[str]:
    for example in looked.examples:
        if example.cut_tokens and not example.lost_targets:
            yield f"task.max_length cuts {counted(example.cut_tokens, 'token')} away, none of them learnt"
