"""Every template of the zoo with every kind of row, through the encoder of the task `chat`."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

from finetune.data.example import Example
from finetune.errors import DataError
from finetune.recipe.schema import ChatTask
from finetune.tasks.chat import TASK
from tests.zoo import oracle
from tests.zoo.catalog import ZOO, Specimen
from tests.zoo.drawn import row
from tests.zoo.judge import Verdict, judged
from tests.zoo.rows import MORE, ROWS


def encode(specimen: Specimen, row: dict[str, Any]) -> list[Example]:
    """The examples of a row, as a training would have them."""
    if specimen.variables and "template_variables" not in ChatTask.model_fields:
        raise DataError("`task.template_variables` is not there yet")
    variables = {"template_variables": specimen.variables} if specimen.variables else {}
    task = ChatTask(name="chat", max_length=100_000, **variables)
    encoder = TASK.encoder(specimen.tokenizer_with_template, task, specimen.stop_ids, date=oracle.DAY)
    return encoder([row], ["row 1"])[0]


def digest(examples: list[Example]) -> str:
    """Of tokens and masks."""
    found = hashlib.sha256()
    for example in examples:
        found.update(example.tokens.astype("<i4").tobytes() + b"|" + example.supervised.tobytes() + b"\n")
    return found.hexdigest()[:12]


def cells(
    names: list[str] | None = None, kinds: list[str] | None = None, drawn: range = range(0)
) -> Iterator[tuple[str, str, Verdict]]:
    """Each template with each kind of row, and with drawn rows of these numbers."""
    rows = {kind: (ROWS | MORE)[kind] for kind in (ROWS if kinds is None else kinds)}
    rows |= {f"drawn row {number}": row(number) for number in drawn}
    for name in names or ZOO:
        for kind, each in rows.items():
            yield name, kind, judged(ZOO[name], each, encode)


def counts(verdicts: list[Verdict]) -> Counter[str]:
    found = Counter(verdict.state for verdict in verdicts)
    refused = [verdict for verdict in verdicts if verdict.state == "refused"]
    found["refused, though it could be learnt"] = sum(verdict.is_possible for verdict in refused)
    found["refused, without turn or field"] = sum(not verdict.is_named for verdict in refused)
    return found
