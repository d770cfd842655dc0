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
from typing import Any

from finetune.errors import CheckpointError, FinetuneError
from finetune.store import durable
from finetune.store.checkpoints import assembled
from finetune.store.checkpoints.assembled import Digests, Part, Written
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

    def shared_out(self, sizes: Mapping[str, int]) -> Mapping[int, Sequence[str]]:
        return assembled.shared_out(sizes, [1, 0])

    def ask_to_write(self, directory: Path, names: Sequence[str]) -> None:
        self._ask({"directory": str(directory), "write": list(names)})

    def written(self) -> Mapping[int, Mapping[str, Sequence[Part]]]:
        return {1: {name: [Part(*part) for part in parts] for name, parts in self._answer().items()}}

    def ask_to_read(self, directory: Path, files: Mapping[int, Mapping[str, Written]]) -> None:
        self._ask({"directory": str(directory), "read": files.get(1, {})})

    def read(self) -> Mapping[str, Digests]:
        return {name: Digests(*found) for name, found in self._answer().items()}

    def _ask(self, order: Mapping[str, object]) -> None:
        with self._or_gone():
            self._file.write(json.dumps(order) + "\n")

    def _answer(self) -> Any:
        with self._or_gone():
            said = json.loads(self._file.readline() or '{"error": "is gone"}')
        if "error" in said:
            raise CheckpointError(f"rank 1: {said['error']}")
        return said["found"]

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
    attempt.write_files(
        {name: (rows(tensors, 0) if connection else tensors, metadata) for name, (tensors, metadata) in FILES.items()}
    )
    attempt.write_json("state.json", {"step": 200})
    attempt.link("tokenizer.json", first.path / "tokenizer.json", first.manifest.files["tokenizer.json"])
    store.commit(attempt, Manifest(run="r", attempt="a2", step=200, parent=None, plan_id="p"))
    sys.stdout.write("committed step 200")
    sys.stdout.flush()
    store.remove(first)
    store.demote(second)


def obeyed(directory: Path, order: Mapping[str, Any]) -> Mapping[str, object]:
    """What rank 1 wrote, or found when it read back."""
    if "write" in order:
        mine = {name: assembled.layout(rows(FILES[name][0], 1), FILES[name][1]) for name in order["write"]}
        return {name: assembled.write_rows(directory / name, made) for name, made in mine.items()}
    whole = {name: Written.again(*each) for name, each in order["read"].items()}
    return {
        name: assembled.read_back(directory / name, each.layout(FILES[name][1]), each.parts)
        for name, each in whole.items()
    }


def write_beside(connection: socket.socket) -> None:
    """What rank 1 does until rank 0 has ended."""
    with connection.makefile("rw", buffering=1) as file:
        for line in file:
            order = json.loads(line)
            directory = Path(order["directory"])
            try:
                with failures(directory):
                    said = {"found": obeyed(directory, order)}
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
