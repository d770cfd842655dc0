"""The process of one tracker beside a training, which follows its journal: `python -m finetune.training.trackers RUN NAME`."""

import os
import sys
from functools import partial
from pathlib import Path

from finetune.store.companion import Follow, serve


def imported() -> Follow:
    from finetune.training.trackers.follow import follow

    return partial(follow, Path(sys.argv[1]), sys.argv[2])


if __name__ == "__main__":
    # At once: threads of a client that hangs must not keep the process.
    os._exit(serve(imported))
