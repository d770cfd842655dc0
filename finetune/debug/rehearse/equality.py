"""Compares two runs of one plan, to the bit, and finds the first difference."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from finetune.store.checkpoints.manifest import Checkpoint
from finetune.store.checkpoints.store import Store
from finetune.store.checkpoints.verify import verify
from finetune.store.run import journal, row_losses


@dataclass(frozen=True)
class Difference:
    """The first difference: its value in each of two runs, and the step."""

    step: int
    quantity: str
    uninterrupted: object
    resumed: object


def first_difference(whole: Path, resumed: Path, last: int) -> Difference | None:
    """Compares every record and row loss up to step `last`, then every byte and digest of the checkpoints there."""
    return next(_differences(whole, resumed, last), None)


def _differences(whole: Path, resumed: Path, last: int) -> Iterator[Difference]:
    steps, records = journal.steps(journal.read(whole)), journal.read(resumed)
    for step in range(1, last + 1):
        # every record of a step, not only the last: steps before the kill must be the same as well
        of_step: list[Mapping[str, object]] = [
            item for item in records if item["kind"] == "step" and item["step"] == step
        ]
        for record in of_step or [{}]:
            if quantity := journal.difference(steps[step], record):
                yield Difference(step, quantity, steps[step].get(quantity), record.get(quantity))
        for one, two in zip_longest(row_losses.read_rows(whole, step), row_losses.read_rows(resumed, step)):
            if one != two:
                yield Difference(step, f"loss of row {(one or two).row}", one and one.loss, two and two.loss)
    checkpoints = [Store(run).find(last) for run in (whole, resumed)]
    damages = [_first_damage(checkpoint) for checkpoint in checkpoints]
    if any(damages):
        yield Difference(last, "bytes on the disk", *damages)
    one, two = (_digests(checkpoint) for checkpoint in checkpoints)
    for name in [*one, *(name for name in two if name not in one)]:
        if one.get(name) != two.get(name):
            yield Difference(last, name, one.get(name), two.get(name))


def compared(run: Path, last: int) -> dict[str, int]:
    """The amounts that `first_difference` compares."""
    names = _digests(Store(run).find(last))
    return {
        "steps": last,
        "rows": sum(len(row_losses.read_rows(run, step)) for step in range(1, last + 1)),
        "tensors": sum(name.startswith("tensor ") for name in names),
        "files": sum(name.startswith("file ") for name in names),
    }


def _first_damage(checkpoint: Checkpoint) -> str | None:
    damages = verify(checkpoint.path)
    return f"{damages[0].file}: {damages[0].message}" if damages else None


def _digests(checkpoint: Checkpoint) -> dict[str, str]:
    """The digest of each tensor, and of each file without tensors."""
    found = {}
    for name, file in checkpoint.manifest.files.items():
        for tensor in file.tensors:
            found[f"tensor {tensor.name} of {name}"] = f"{tensor.dtype}{list(tensor.shape)} {tensor.digest}"
        if not file.tensors and name != "trainer_state.json":  # it names the cadence of saves
            found[f"file {name}"] = file.digest
    return found
