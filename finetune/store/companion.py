"""A process beside a training that serves it, and never harms it: the lowest priority, its client's output to nowhere, an end at any time."""

import os
import select
import signal
from collections.abc import Callable

HasEnded = Callable[[float], bool]
"""(seconds) -> whether the training has ended, or does within these seconds."""
Say = Callable[[str], None]
"""A line for the training."""
Alarm = Callable[[int], object]
"""Seconds until the process is killed, unless it says so again; 0: never."""
Follow = Callable[[HasEnded, Say, Alarm], None]


def serve(imported: Callable[[], Follow]) -> int:
    """Follows the training until stdin ends; the exit code. `imported` imports what follows, once the process has its priority."""
    os.nice(19)  # before the imports: the training comes first
    follow = imported()
    from finetune.errors import FinetuneError
    from finetune.store.told import told

    # Kills a process that stands in native code too, which an exception would not.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    ends, says = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):  # what clients print is not for the log of a training, and may hold a key
        os.dup2(nothing, descriptor)

    def has_ended(seconds: float) -> bool:
        return bool(select.select([ends], [], [], seconds)[0])

    def say(line: str) -> None:
        try:
            os.write(says, f"{line}\n".encode())
        except OSError:  # the training is gone: nobody listens
            return

    try:
        follow(has_ended, say, signal.alarm)
    except FinetuneError as error:
        say(error.message)
        return 1
    except Exception as error:  # noqa: BLE001 - of a client, which may raise anything
        say(told(error))
        return 1
    return 0
