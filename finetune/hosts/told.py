"""The code of the error that ends a rank, for the launcher that started it: no code means a crash, which a restart may cure."""

import os
from collections.abc import MutableMapping
from contextlib import suppress

from finetune.hosts.world import TOLD

_told: int | None = None
"""The pipe to the launcher, if there is one."""


def take(environment: MutableMapping[str, str]) -> None:
    """Takes the pipe out of the environment: it is not for processes that this one starts."""
    global _told
    told = environment.pop(TOLD, None)
    _told = int(told) if told else None


def tell(code: str) -> None:
    """Sends a code, if a launcher listens."""
    if _told is not None:
        with suppress(OSError):  # it is gone
            os.write(_told, code.encode())
