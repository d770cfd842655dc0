"""One save by `Store`, without torch, for `syscalls.py`: journal, attempt, commit, then retention removes a checkpoint and demotes another.

python scripts/faults/one_save.py RUN                     one process writes
python scripts/faults/one_save.py RUN RANK DESCRIPTOR     two ranks write their rows, and are connected by a socket
"""

import json
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from finetune.errors import CheckpointError, FinetuneError
from finetune.store import durable
from finetune.store.checkpoints import assembled
from finetune.store.checkpoints.assembled import Part
from finetune.store.checkpoints.manifest import Manifest
from finetune.store.checkpoints.store import Store
from finetune.store.durable import failures
from finetune.store.run.journal import Journal
from finetune.store.tensors import Tensor

RANKS = 2
FILES = {
    "model.safetensors": ([Tensor("w", "F32", (4, 1250), b"1234" * 5000)], {"format": "pt"}),
    "optimizer.safetensors": ([Tensor("m", "F32", (250,), b"4321" * 250)], {}),
}


class OtherRank:
    """Rank 1, as rank 0 sees it: what `training.saving.sharded` says over gloo goes through a socket here."""

    def __init__(self, connection: socket.socket):
        self._file = connection.makefile("rw", buffering=1)

    def ask(self, path: Path) -> None:
        with self._or_gone():
            self._file.write(f"{path}\n")

    def answers(self) -> Mapping[int, Sequence[Part]]:
        with self._or_gone():
            said = json.loads(self._file.readline() or '{"error": "is gone"}')
        if "error" in said:
            raise CheckpointError(f"rank 1: {said['error']}")
        return {1: [Part(*part) for part in said["parts"]]}

    @contextmanager
    def _or_gone(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CheckpointError("rank 1: is gone") from error


def rows(tensors: Sequence[Tensor], rank: int) -> list[Tensor]:
    """A rank's half of each tensor."""
    return [
        replace(each, data=memoryview(each.data)[first : first + each.bytes // RANKS], first=first)
        for each in tensors
        for first in [rank * each.bytes // RANKS]
    ]


def save(run: Path, connection: socket.socket | None) -> None:
    store = Store(run)
    first, second = store.find(100), store.find(150)
    journal = Journal(run)
    journal.append({"kind": "step", "step": 200})
    journal.sync()
    attempt = store.begin(200, "a2", OtherRank(connection) if connection else None)
    for name, (tensors, metadata) in FILES.items():
        attempt.write_tensors(name, rows(tensors, 0) if connection else tensors, metadata)
    attempt.write_json("state.json", {"step": 200})
    attempt.link("tokenizer.json", first.path / "tokenizer.json", first.manifest.files["tokenizer.json"])
    store.commit(attempt, Manifest(run="r", attempt="a2", step=200, parent=None, plan_id="p"))
    sys.stdout.write("committed step 200")
    sys.stdout.flush()
    store.remove(first)
    store.demote(second)


def write_beside(connection: socket.socket) -> None:
    """What rank 1 does until rank 0 has ended."""
    with connection.makefile("rw", buffering=1) as file:
        for line in file:
            path = Path(line.rstrip("\n"))
            tensors, metadata = FILES[path.name]
            try:
                with failures(path):
                    said = {"parts": assembled.write_rows(path, assembled.layout(rows(tensors, 1), metadata))}
            except FinetuneError as error:
                said = {"error": error.message}
            file.write(json.dumps(said) + "\n")


def main() -> None:
    durable.BUFFER_BYTES = 4096  # else nothing so small would be written past the page cache
    run, *place = sys.argv[1:]
    connection = socket.socket(fileno=int(place[1])) if place else None
    if connection and place[0] == "1":
        write_beside(connection)
        return
    try:
        save(Path(run), connection)
    except FinetuneError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
