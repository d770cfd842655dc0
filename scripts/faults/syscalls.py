"""Stops a save before, or fails, every single system call that it makes, and looks at what is left on the disk.

    python scripts/faults/syscalls.py                                    every call, every fault
    python scripts/faults/syscalls.py --faults SIGKILL,EIO --stride 3    every third call
    python scripts/faults/syscalls.py --victim 1                         two ranks save, and the second meets the faults
    python scripts/faults/syscalls.py --real --trials 40 --work /tmp/real

One save without torch (`one_save.py`), by one process or by two that each write their rows. strace (1) stops the process tree before the Nth call of a kind, or answers it with an error, for every kind and every N that a rehearsal
has made; the files that Python opens for itself are left alone. --real does it to a training instead, at random places: see
`real_syscalls.py`. Prints a table; exits 1 unless after every fault there was a sound checkpoint and the next save worked.
"""

import argparse
import collections
import errno
import itertools
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import PIPE
from typing import NamedTuple

from finetune.store.checkpoints.manifest import Manifest
from finetune.store.checkpoints.store import Store
from finetune.store.checkpoints.verify import verify
from finetune.store.tensors import Tensor

PLAIN = ("mkdir", "openat", "write", "fsync", "fdatasync", "link", "rename", "unlink", "unlinkat", "rmdir")
OF_RANKS = ("pwrite64", "fallocate")
"""Further calls of a save to which each rank writes its rows."""
CALLS = PLAIN + OF_RANKS
FAULTS = ("SIGKILL", "EIO", "ENOSPC", "EDQUOT", "EROFS", "EACCES")
REMOVALS = ("unlink", "unlinkat", "rmdir")
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
SAVE = Path(__file__).with_name("one_save.py")


class Ended(NamedTuple):
    """A save, by one process or two."""

    codes: list[int]
    """Exit code of each rank; that of strace where it was the victim."""
    out: str
    """Of rank 0."""
    said: list[str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", default=",".join(FAULTS), help="signals and error names, with commas between them")
    parser.add_argument("--stride", type=int, default=1, help="take every N-th pair of call and fault")
    parser.add_argument("--real", action="store_true", help="in a training, at random calls")
    parser.add_argument("--recipe", type=Path, help="with --real: a recipe; without one a tiny one is made")
    parser.add_argument("--trials", type=int, default=24, help="with --real: how many trainings")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="with --real: a new directory for runs and logs")
    parser.add_argument("--set", dest="overrides", action="append", default=[], help="with --real")
    parser.add_argument("--victim", type=int, choices=(0, 1), help="two ranks save, and this one meets the faults")
    options = parser.parse_args()
    faults = options.faults.split(",")
    if shutil.which("strace") is None:
        raise SystemExit("strace is not installed")
    if options.real:
        import real_syscalls

        if options.work is None:
            parser.error("--real needs --work")
        real_syscalls.run(options, faults)
    with tempfile.TemporaryDirectory(prefix="syscalls-") as place:
        run, points = rehearse(Path(place), options.victim)
        chosen = list(itertools.product(faults, points))[:: options.stride]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            results = list(pool.map(lambda item: problems_after(run, *item, options.victim), chosen))
    print_table([(fault, name) for fault, (name, _) in chosen], [problem for found in results for problem in found])


def print_table(done: list[tuple[str, str]], problems: list[str]) -> None:
    """How often each fault was put into each kind of call, and the verdict, which is also the exit code."""
    counts = collections.Counter(done)
    names = sorted({name for _, name in done})
    print(f"{'':8}" + "".join(f"{name:>11}" for name in names))
    for fault in dict.fromkeys(fault for fault, _ in done):
        print(f"{fault:8}" + "".join(f"{counts[fault, name]:11}" for name in names))
    for problem in problems[:20]:
        print(problem)
    print(f"{'FAIL' if problems else 'PASS'}: {len(done)} injections, {len(problems)} problems")
    sys.exit(1 if problems else 0)


def rehearse(place: Path, victim: int | None) -> tuple[Path, list[tuple[str, int]]]:
    """A run with two commits, and every call (name, number) that the save after them makes."""
    run = place / "run"
    for step in (100, 150):
        commit(Store(run), step)
    rehearsal, trace = shutil.copytree(run, place / "rehearsal"), place / "trace"
    result = save_under_strace(rehearsal, ["-y", "-o", str(trace), "-e", f"trace={','.join(CALLS)}"], victim)
    if any(result.codes):
        raise SystemExit(f"the save fails without any fault:\n{result.said}")
    calls = re.findall(rf"^\d+ +({'|'.join(CALLS)})(\(.*)", trace.read_text(), re.MULTILINE)
    expected = {None: PLAIN, 0: CALLS, 1: ("openat", "pwrite64", "fsync")}[victim]
    if missing := set(expected) - {name for name, _ in calls}:
        raise SystemExit(f"the save makes no {', '.join(sorted(missing))}")
    counts, points = collections.Counter(), []
    for name, arguments in calls:
        counts[name] += 1
        if str(rehearsal) in arguments:  # Python opens its own modules too, and the save writes to stdout
            points.append((name, counts[name]))
    return run, points


def commit(store: Store, step: int) -> None:
    attempt = store.begin(step, "a1")
    attempt.write_tensors("model.safetensors", [Tensor("w", "F32", (750,), b"abcd" * 750)], {"format": "pt"})
    attempt.write_tensors("optimizer.safetensors", [Tensor("m", "F32", (250,), b"dcba" * 250)], {})
    attempt.write_json("state.json", {"step": step})
    attempt.write_bytes("tokenizer.json", b"{}" * 40)
    store.commit(attempt, Manifest(run="r", attempt="a1", step=step, parent=None, plan_id="p"))


def save_under_strace(run: Path, strace: list[str], victim: int | None) -> Ended:
    """The next save of a run, with strace around the only process, or around one of two."""
    connections = socket.socketpair()
    started = []
    for rank in (0, 1) if victim is not None else (0,):
        words = [sys.executable, "-B", str(SAVE), str(run)]
        words += [str(rank), str(connections[rank].fileno())] if victim is not None else []
        is_traced = rank == (victim or 0)
        words = ["strace", "-f", "-qq", *strace, *words] if is_traced else words
        kept = [connections[rank].fileno()]
        started.append(subprocess.Popen(words, stdout=PIPE, stderr=PIPE, text=True, pass_fds=kept, env=ENVIRONMENT))
    for connection in connections:
        connection.close()
    said = [process.communicate(timeout=60) for process in started]
    return Ended([process.returncode for process in started], said[0][0], [err for _, err in said])


def injection(fault: str, name: str, number: int) -> list[str]:
    """What tells strace to put a fault into the Nth call of a kind, in each thread."""
    effect = f"signal={fault}" if fault.startswith("SIG") else f"error={fault}"
    return ["-e", f"trace={name}", "-e", f"inject={name}:{effect}:when={number}"]


def problems_after(run: Path, fault: str, point: tuple[str, int], victim: int | None) -> list[str]:
    """One save into a copy of the run, with a fault at one call, and all that is wrong with what it said and left."""
    name, number = point
    copy = shutil.copytree(run, run.with_name(f"{name}-{number}-{fault}"))
    result = save_under_strace(copy, ["-o", "/dev/null", *injection(fault, name, number)], victim)
    found = _wrong_ending_beside(result, fault) if victim else _wrong_ending(result, fault, name, copy)
    store = Store(copy)
    newest, damages = store.newest_sound()
    expected = (200,) if "committed step 200" in result.out else (150, 200)
    if newest is None or newest.step not in expected:
        found.append(f"the newest sound checkpoint is {newest and newest.step}, not one of {expected}")
    found += [f"{item.path.name} is no checkpoint" for item in store.unreadable()] + [str(item) for item in damages]
    # what a demotion has not yet removed is in no manifest, until the next holder of the lease sweeps
    checks = {damage.check for checkpoint in store.checkpoints() for damage in verify(checkpoint.path)}
    found += [f"a checkpoint is damaged: {check}" for check in checks - {"extra"}]
    if not fault.startswith("SIG") and name not in REMOVALS and os.listdir(copy / "attempts"):
        found.append("the attempt was left behind")
    store.sweep()
    found += [f"after a sweep: {damage}" for checkpoint in store.checkpoints() for damage in verify(checkpoint.path)]
    commit(store, 300)
    shutil.rmtree(copy)
    return [f"{fault} at {name} {number}: {problem}" for problem in found]


def _wrong_ending(result: Ended, fault: str, name: str, run: Path) -> list[str]:
    code, said = result.codes[0], result.said[0]
    found = [f"the other rank ended with {other}: {result.said[1]}" for other in result.codes[1:] if other]
    if fault.startswith("SIG"):
        return found if code == -9 else [*found, f"was not killed, but ended with {code}"]
    if fault in ("ENOSPC", "EDQUOT") and name == "write" and code == 0:
        return found  # a line of the journal: it waits, and was written with the next one
    is_clear = "Traceback" not in said and str(run) in said and "\nhint: " in said
    return found if code == 1 and is_clear else [*found, f"exit code {code}: {said}"]


def _wrong_ending_beside(result: Ended, fault: str) -> list[str]:
    """Whether rank 0 ended with one clear error, after a fault in rank 1."""
    is_kill = fault.startswith("SIG")
    reason = "is gone" if is_kill else f"cannot write: {os.strerror(getattr(errno, fault)).lower()}"
    is_clear = result.said[0].strip() == f"rank 1: {reason}"
    is_as_it_must_be = result.codes == [1, -9 if is_kill else 0] and is_clear
    return [] if is_as_it_must_be else [f"exit codes {result.codes}: {result.said}"]


if __name__ == "__main__":
    main()
