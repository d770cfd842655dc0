"""How commands import what imports torch: without looking through a million new objects for garbage."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """Keeps the garbage collector out while modules are imported: a fifth of the time that torch and transformers take.

    What they made stays until the end, so no later collection looks at it either. Where torch is imported already, nothing changes:
    what a process did before this command is not to be kept.
    """
    if "torch" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
