"""A set of rows to evaluate: the held-out ones, or others by name."""

from dataclasses import dataclass

import numpy as np

from finetune.data.batches import Examples
from finetune.plan import split


@dataclass(frozen=True)
class RowSet:
    name: str
    examples: Examples
    rows: np.ndarray
    """The numbers of its rows, counted through its sources, int64 (N,), sorted."""
    says: np.ndarray
    """Hash of the content of each, uint64 (N,)."""

    @property
    def contents(self) -> str:
        """Digest of the rows, independent of their order."""
        return split.digest(self.says)
