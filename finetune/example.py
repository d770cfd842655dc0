"""Floor 0. The noun between `tasks`, which make examples of rows, and `data`, which stores, orders and batches them."""

from typing import NamedTuple

import numpy as np


class Example(NamedTuple):
    """One encoded row, or a stretch of one."""

    tokens: np.ndarray
    """Token ids, int32, shape (length,)."""
    supervised: np.ndarray
    """Which tokens the loss is on, bool, shape (length,)."""
    cut_tokens: int = 0
    """Tokens of the row that did not fit into `max_length` and were dropped."""
