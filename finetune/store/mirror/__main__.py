"""The process that mirrors a run beside its training: `python -m finetune.store.mirror RUN`. At its end it sends the rest."""

import os
import sys
from functools import partial
from pathlib import Path

from finetune.store.companion import Follow, serve


def imported() -> Follow:
    from finetune.store.mirror.following import follow

    return partial(follow, Path(sys.argv[1]))


if __name__ == "__main__":
    # At once: threads of a client that hangs must not keep the process.
    os._exit(serve(imported))
