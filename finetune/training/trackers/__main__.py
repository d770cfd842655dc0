"""The process of one tracker beside a training: `python -m finetune.training.trackers RUN NAME`.

It follows the journal until its stdin ends. A client may fail, hang or crash here; the training never waits for it.
"""

import os
import select
import signal
import sys
from pathlib import Path


def main(run: Path, name: str) -> int:
    # Before the imports: the training comes first.
    os.nice(19)
    from finetune.store.told import told
    from finetune.training.trackers.follow import follow

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
        follow(run, name, has_ended, say, signal.alarm)
    except Exception as error:  # noqa: BLE001 - of a client, which may raise anything
        say(told(error))
        return 1
    return 0


if __name__ == "__main__":
    # At once: threads of a client that hangs must not keep the process.
    os._exit(main(Path(sys.argv[1]), sys.argv[2]))
