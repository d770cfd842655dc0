"""Rows that say the same, rows on both sides of the split, and answers that contradict each other; by hashes, 8 bytes each a row."""

from array import array
from collections.abc import Iterator

import numpy as np

from finetune.data.checks.conversations import tool_names
from finetune.data.checks.looked import Context, Found, Looked
from finetune.plan.split import content_of

LONGEST = 1_000_000  # characters


class Hashes:
    """A hash or two for each row, and its number."""

    def __init__(self, context: Context):
        self._where = context.where
        self._rows, self._keys = array("q"), array("Q")

    def keep(self, row: int, key: int) -> None:
        self._rows.append(row)
        self._keys.append(key)

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows and keys, sorted by key and of equal keys by row; and the order that sorted them."""
        keys = np.array(self._keys)
        order = np.argsort(keys, kind="stable")
        return np.array(self._rows)[order], keys[order], order


class Duplicates(Hashes):
    def look(self, looked: Looked) -> Iterator[Found]:
        if any(part.text.strip() for part in looked.parts):
            self.keep(looked.row, looked.content)
        return iter(())

    def end(self, held_out: np.ndarray) -> Iterator[Found]:
        """Each later copy, on either side of the split alone."""
        all_rows, all_keys, _ = self.arrays()
        found = []
        for side in (False, True):
            chosen = held_out[all_rows] == side
            rows, keys = all_rows[chosen], all_keys[chosen]
            firsts = first_equal(keys)
            found += [pair for pair in zip(rows.tolist(), rows[firsts].tolist(), strict=True) if pair[0] != pair[1]]
        for row, first in sorted(found):
            yield Found(row, self._where(row), f"is a copy of {self._where(first)}")


class SeenHoldout(Duplicates):
    def end(self, held_out: np.ndarray) -> Iterator[Found]:
        """Held-out rows that are training rows as well."""
        rows, keys, _ = self.arrays()
        is_out = held_out[rows]
        trained, firsts = np.unique(keys[~is_out], return_index=True)
        trained_rows = rows[~is_out][firsts]
        places = np.searchsorted(trained, keys[is_out])
        for row, key, place in zip(rows[is_out].tolist(), keys[is_out], places.tolist(), strict=True):
            if place < len(trained) and trained[place] == key:
                message = f"is held out, and {self._where(int(trained_rows[place]))} trains on the same"
                yield Found(row, self._where(row), message)


class Conflicts(Hashes):
    """Equal prompts with different last answers; case and blanks do not count."""

    def __init__(self, context: Context):
        super().__init__(context)
        self._answers = array("Q")

    def look(self, looked: Looked) -> Iterator[Found]:
        if looked.answers and looked.prompts:
            answer = looked.answers[-1]
            number = looked.parts.index(answer)
            before = [(part.role, part.text) for part in looked.parts[:number]]
            key = content_of([before, sorted(tool_names(looked.columns.get("tools")))])
            value = content_of([_said(part.text) for part in looked.parts[number:]])
            self.keep(looked.row, key)
            self._answers.append(value)
        return iter(())

    def end(self, held_out: np.ndarray) -> Iterator[Found]:
        rows, keys, order = self.arrays()
        values = np.array(self._answers)[order]
        firsts = first_equal(keys)
        differs = values != values[firsts]
        for row, first in sorted(zip(rows[differs].tolist(), rows[firsts][differs].tolist(), strict=True)):
            yield Found(row, self._where(row), f"has another answer to the prompt of {self._where(first)}")


def _said(text: str) -> str:
    """Without case and blanks; a very long text as it is, since its words would take much memory."""
    return text if len(text) > LONGEST else " ".join(text.casefold().split())


def first_equal(keys: np.ndarray) -> np.ndarray:
    """For each of the sorted keys, the place of the first that equals it."""
    is_new = np.ones(len(keys), dtype=bool)
    is_new[1:] = keys[1:] != keys[:-1]
    return np.maximum.accumulate(np.where(is_new, np.arange(len(keys)), 0))
