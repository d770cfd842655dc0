"""What a save costs a training whose ranks each write their rows, beside trainings of which one process writes all.

Three trainings of the same recipe live at once, and save in turns; the others wait meanwhile. Run as a program this file is one of
their ranks: it makes a save for each line that it reads, and answers with its seconds.
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median

from contestants import commits, state_bytes
from figures import OURS, Goal, Part, Quantity, rotated
from training import Shape, Training, Work, opened, write_recipe

QUIET_STEPS = 2  # before each save
STEPS_BESIDE = 3  # after it: the copy is over by then, and often the save
SHARDED = f"{OURS}, 2 ranks, each writes its rows"
WHOLE = f"{OURS}, 2 ranks, one writes all"
SINGLE = f"{OURS}, 1 process"
CONTESTANTS = {SHARDED: ("fsdp", 2), WHOLE: ("ddp", 2), SINGLE: ("ddp", 1)}


def beside_single(work: Path, model: Shape, size: Work, rounds: int) -> Part:
    """All three on the same state."""
    blocked = Quantity(
        "blocked time per save, of the rank that waits longest: the call, and what the next update waits", "ms"
    )
    durable = Quantity("from the call until the save is durable, beside training", "s")
    of_round: dict[str, list[float]] = {}
    with ExitStack() as stack:
        trainings = {name: stack.enter_context(_training(work, model, size, *how)) for name, how in CONTESTANTS.items()}
        for turn in range(-1, rounds):
            for name in rotated(list(CONTESTANTS), turn) if turn >= 0 else CONTESTANTS:
                answers = _save(trainings[name])
                if turn >= 0:  # the first save makes the buffers
                    blocked.add(name, max(answer["blocked"] for answer in answers))
                    durable.add(name, answers[0]["durable"])
                    of_round.setdefault(name, []).append(blocked.samples[name][-1])
        facts = {"state bytes": _state_bytes(trainings[SINGLE])}
    for quantity in (blocked, durable):
        quantity.samples = {name: quantity.samples[name] for name in CONTESTANTS}
    ratios = [one / other for one, other in zip(of_round[SHARDED], of_round[SINGLE], strict=True)]
    facts["sharded / single, blocked, by round"] = f"{median(ratios):.2f} ({min(ratios):.2f}..{max(ratios):.2f})"
    goal = Goal("blocked time of a sharded save, as a multiple of a single one", median(ratios), 1.0, "")
    return Part([blocked, durable], [goal], facts)


@contextmanager
def _training(work: Path, model: Shape, size: Work, strategy: str, ranks: int) -> Iterator[list[subprocess.Popen]]:
    """The processes of one, after their first step."""
    name = f"f-{strategy}-{ranks}"
    recipe = write_recipe(work / f"{name}.yaml", model, size, strategy=strategy)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    shared = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = []
    for rank in range(ranks):
        place = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"} | place
        words = [sys.executable, __file__, str(recipe), str(work / name)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        started.append(subprocess.Popen(words, env=environment, text=True, **pipes))
    try:
        for each in started:
            _answer(each)
        yield started
        for each in started:
            each.stdin.close()
        for each in started:
            each.wait(timeout=120)
    finally:
        for each in started:
            each.kill()
            each.wait()


def _save(processes: list[subprocess.Popen]) -> list[dict]:
    for each in processes:
        each.stdin.write("save\n")
        each.stdin.flush()
    return [_answer(each) for each in processes]


def _answer(process: subprocess.Popen) -> dict:
    if not (line := process.stdout.readline()):
        raise SystemExit(f"a rank ended with {process.wait()}")
    return json.loads(line)


def _state_bytes(processes: list[subprocess.Popen]) -> int:
    """Of the state that a save holds."""
    return _save(processes)[0]["bytes"]


def save(training: Training) -> dict:
    """One on this rank. All ranks take the same steps."""
    for _ in range(QUIET_STEPS):
        training.step()
    started = time.perf_counter()
    training.recorder.commit(training.state)
    call = time.perf_counter() - started
    awaited = sum(training.step()[1] for _ in range(STEPS_BESIDE))
    training.settle()
    os.sync()
    durable = commits(training)[0]["save_seconds"] if training.recorder.is_writer else None
    return {"blocked": call + awaited, "durable": durable, "bytes": state_bytes(training.state)}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # prints of the libraries
    recipe, run = map(Path, sys.argv[1:])
    with opened(recipe, run) as training:
        answers.write("{}\n")
        for _ in sys.stdin:
            answers.write(json.dumps(save(training)) + "\n")


if __name__ == "__main__":
    main()
