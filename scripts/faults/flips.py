"""Damages the files of a checkpoint, one at a time, and asks `verify` each time which file and which tensors are not right.

    python scripts/faults/flips.py --damages 10000
    python scripts/faults/flips.py --checkpoint runs/a/checkpoints/step-00000400 --damages 500

Flipped bits, cut ends, and sectors (512 bytes) or pages (4,096) that read as zeros, in turn over all files, the manifest included,
at random places. Without --checkpoint a small one is made. The checkpoint itself is only read: a copy is damaged. Prints a table;
exits 1 unless every damage was found, in the right file, and in exactly those tensors whose bytes are others.
"""

import argparse
import collections
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from finetune.store.checkpoints.manifest import MANIFEST, Manifest
from finetune.store.checkpoints.store import Store
from finetune.store.checkpoints.verify import verify
from finetune.store.tensors import Tensor, read_header

KINDS = ("flipped bit", "cut end", "zeroed sector", "zeroed page")


@dataclass(frozen=True)
class Injury:
    """What was done to one file: its bytes before and after."""

    kind: str
    file: str
    before: bytes
    after: bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, help="a checkpoint directory; without it a small one is made")
    parser.add_argument("--damages", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="flips-") as place:
        checkpoint = options.checkpoint or small_checkpoint(Path(place) / "run")
        copy = shutil.copytree(checkpoint, Path(place) / "copies" / checkpoint.name)
        done, problems = collections.Counter(), []
        for injury in injuries(copy, options.damages, options.seed):
            done[injury.file, injury.kind] += 1
            problems += missed(copy, injury)
        problems += [f"the restored copy is not sound: {damage}" for damage in verify(copy)]
    for (file, kind), count in sorted(done.items()):
        print(f"{file:28} {kind:14} {count:6,}")
    for problem in problems[:20]:
        print(problem)
    print(f"{'FAIL' if problems else 'PASS'}: {done.total():,} damages, {len(problems)} missed or misnamed")
    sys.exit(1 if problems else 0)


def injuries(checkpoint: Path, count: int, seed: int = 0) -> Iterator[Injury]:
    """Damages the directory, yields while it is damaged, and restores it, `count` times: each file and kind in its turn."""
    draw = random.Random(seed)
    files = sorted(path for path in checkpoint.iterdir() if path.stat().st_size)
    for number in range(count):
        path = files[number % len(files)]
        before = path.read_bytes()
        kinds = KINDS if any(before) else KINDS[:2]  # zeroing zeros changes nothing
        kind = kinds[number // len(files) % len(kinds)]
        after = before
        while after == before:
            after = damaged(before, kind, draw)
        rewrite(path, after)
        yield Injury(kind, path.name, before, after)
        rewrite(path, before)


def damaged(content: bytes, kind: str, draw: random.Random) -> bytes:
    place = draw.randrange(len(content))
    if kind == "flipped bit":
        return content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :]
    if kind == "cut end":
        return content[:place]
    size = 512 if kind == "zeroed sector" else 4096
    start = place // size * size
    end = min(start + size, len(content))
    return content[:start] + bytes(end - start) + content[end:]


def rewrite(path: Path, content: bytes) -> None:
    path.unlink()  # it is read-only
    path.write_bytes(content)


def missed(checkpoint: Path, injury: Injury) -> list[str]:
    """What `verify` does not say of an injury, or says wrongly."""
    found = verify(checkpoint)
    name = f"{injury.file}, {injury.kind}"
    if not found:
        return [f"{name}: not found"]
    if files := {damage.file for damage in found} - {injury.file}:
        return [f"{name}: {sorted(files)} named"]
    if injury.file == MANIFEST:
        return [] if found[0].check in ("manifest", "foreign") else [f"{name}: {found[0].check}"]
    expected = changed_tensors(checkpoint / injury.file, injury)
    if expected is None:
        return []
    named = {damage.tensor for damage in found if damage.tensor}
    if named != expected:
        return [f"{name}: tensors {sorted(named)} named, {sorted(expected)} are others"]
    if not expected and {damage.check for damage in found} & {"header", "size"} == set():
        return [f"{name}: the header is not named"]
    return []


def changed_tensors(path: Path, injury: Injury) -> set[str] | None:
    """The tensors of which a byte is another or gone; None for a file that has no tensors."""
    if path.suffix != ".safetensors":
        return None
    rewrite(path, injury.before)
    places = read_header(path)
    rewrite(path, injury.after)
    return {name for name, at in places.items() if injury.before[at.start : at.end] != injury.after[at.start : at.end]}


def small_checkpoint(run: Path) -> Path:
    """A commit of three tensors of noise, one of three numbers and one of zeros, and two small files."""
    store, draw = Store(run), random.Random(0)
    attempt = store.begin(100, "a1")
    tensors = [Tensor(f"layer.{number}", "F32", (750,), draw.randbytes(3000)) for number in range(3)]
    tensors += [Tensor("scale", "BF16", (3,), b"abcdef"), Tensor("zeros", "F32", (500,), bytes(2000))]
    attempt.write_tensors("model.safetensors", tensors, {"format": "pt"})
    attempt.write_json("state.json", {"step": 100})
    attempt.write_bytes("tokenizer.json", b"{}" * 40)
    return store.commit(attempt, Manifest(run="r", attempt="a1", step=100, parent=None, plan_id="p")).path


if __name__ == "__main__":
    main()
