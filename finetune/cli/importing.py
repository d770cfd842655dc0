"""How commands import what imports torch: without looking through a million new objects for garbage."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """Stops the garbage collector while modules are imported; it takes a fifth of the time of torch and transformers.

    Their objects stay until the process ends, so later collections skip them too. If torch is imported already, this does nothing:
    an earlier command of the process may have left garbage, and that must not be kept.
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
