"""Rows that say nearly the same: MinHash signatures in bands (Broder 1997; Leskovec et al., Mining of Massive Datasets, chapter 3).

Signatures lie in a temporary file, 136 bytes a row. Candidates are read again and compared exactly, so no pair is a guess.
"""

import re
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from finetune.data.checks.copies import first_equal
from finetune.data.checks.looked import Context, Found, Looked, Part

ALIKE = 0.8  # Jaccard similarity of the sets of 3 words in a row
WORDS = 3
BANDS, ROWS = 16, 6  # of a pair at 0.8 one band agrees in 99 of 100 cases, of a pair at 0.5 in 22
LONGEST = 1_000_000  # characters of a row that are compared
AT_ONCE = 2048  # shingles, rows of signatures
CHARACTERS = "\u0e00-\u0e7f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"  # scripts without blanks between words
# Words and signs; the marks of a sentence do not count.
WORD = re.compile(rf"[{CHARACTERS}]|[^\W{CHARACTERS}]+|[^\w\s.,;:!?'\"’“”]")
RANDOM = np.random.default_rng(0).integers(0, 2**64, (2, BANDS * ROWS), dtype=np.uint64)
FACTORS, TERMS = RANDOM[0] | np.uint64(1), RANDOM[1]
MIX = tuple(np.uint64(number) for number in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


class Compared(NamedTuple):
    """The shingles of a row, and those of its answers."""

    whole: np.ndarray
    answers: np.ndarray


class NearDuplicates:
    is_across = False
    """Whether pairs are those across the split."""

    def __init__(self, context: Context):
        self._context = context
        # open until the last row was seen, then closed
        self._file = tempfile.TemporaryFile(prefix="finetune-near-")  # noqa: SIM115
        self._waiting: list[np.ndarray] = []
        self._count = 0

    def look(self, looked: Looked) -> Iterator[Found]:
        found = signature(_texts(looked.parts))
        if found is not None:
            head = np.array([looked.row, looked.content], dtype=np.uint64)
            self._waiting.append(np.concatenate([head, found]))
            if len(self._waiting) == AT_ONCE:
                self._write()
        return iter(())

    def _write(self) -> None:
        self._file.write(b"".join(each.tobytes() for each in self._waiting))
        self._count += len(self._waiting)
        self._waiting = []

    def end(self, held_out: np.ndarray) -> Iterator[Found]:
        self._write()
        self._file.flush()
        with self._file:
            if not self._count:
                return
            table = np.memmap(self._file, dtype=np.uint64, mode="r", shape=(self._count, 2 + BANDS))
            rows, contents = np.array(table[:, 0]).astype(np.int64), np.array(table[:, 1])
            pairs = np.zeros(0, dtype=np.uint64)
            for band in range(BANDS):
                found = self._candidates(np.array(table[:, 2 + band]), rows, contents, held_out)
                pairs = np.union1d(pairs, found)
        yield from self._alike(pairs)

    def _candidates(self, keys: np.ndarray, rows: np.ndarray, contents: np.ndarray, held_out: np.ndarray) -> np.ndarray:
        """Pairs of rows of which a band agrees, as `later << 32 | earlier`: of many alike rows each with the first and with the one before."""
        order = np.argsort(keys, kind="stable")
        firsts = first_equal(keys[order])
        later = np.flatnonzero(firsts != np.arange(len(keys)))
        ones = np.concatenate([order[later], order[later]])
        twos = np.concatenate([order[firsts[later]], order[later - 1]])
        is_across = held_out[rows[ones]] != held_out[rows[twos]]
        chosen = (contents[ones] != contents[twos]) & (is_across == self.is_across)
        return np.unique((rows[ones] << 32 | rows[twos])[chosen].astype(np.uint64))

    def _alike(self, pairs: np.ndarray) -> Iterator[Found]:
        read = lru_cache(maxsize=256)(lambda row: compared(self._context.parts(row)))
        found: set[int] = set()
        for pair in pairs:
            row, earlier = divmod(int(pair), 2**32)
            if row in found:
                continue
            one, two = read(row), read(earlier)
            alike = similarity(one.whole, two.whole)
            if alike >= ALIKE and similarity(one.answers, two.answers) >= ALIKE:
                found.add(row)
                yield Found(row, self._context.where(row), self._message(earlier, alike))

    def _message(self, earlier: int, alike: float) -> str:
        return f"is nearly {self._context.where(earlier)}: {alike:.0%} of the words in a row are the same"


class NearHoldout(NearDuplicates):
    is_across = True

    def _message(self, earlier: int, alike: float) -> str:
        other = self._context.where(earlier)
        return f"is nearly {other}, on the other side of the split: {alike:.0%} of the words in a row are the same"


def compared(parts: Sequence[Part]) -> Compared:
    answers = [part for part in parts if part.role == "assistant"]
    return Compared(shingles(_texts(parts)), shingles(_texts(answers)))


def similarity(one: np.ndarray, two: np.ndarray) -> float:
    """Of two sets; of two empty ones 1."""
    both = len(np.intersect1d(one, two, assume_unique=True))
    either = len(one) + len(two) - both
    return both / either if either else 1.0


def shingles(text: str) -> np.ndarray:
    """Hashes of every three words in a row, once each (uint64, sorted); of a shorter text one of all its words."""
    words = [zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in WORD.findall(text[:LONGEST].casefold())]
    if not words:
        return np.zeros(0, dtype=np.uint64)
    codes = np.array(words + [0] * (WORDS - len(words)), dtype=np.uint64)
    total = np.zeros(len(codes) - WORDS + 1, dtype=np.uint64)
    for place in range(WORDS):
        total = (total ^ codes[place : len(total) + place]) * MIX[place]
        total ^= total >> np.uint64(29)
    return np.unique(total)


@lru_cache(maxsize=1)  # two checks ask for the same row
def signature(text: str) -> np.ndarray | None:
    """The bands of a text; None without a word."""
    found = shingles(text)
    return bands(found) if len(found) else None


def bands(hashes: np.ndarray) -> np.ndarray:
    """A key for each band (uint64): equal for two sets about as often as the power of their similarity."""
    least = np.full(BANDS * ROWS, np.iinfo(np.uint64).max, dtype=np.uint64)
    for start in range(0, len(hashes), AT_ONCE):
        some = hashes[start : start + AT_ONCE, None] * FACTORS + TERMS
        least = np.minimum(least, some.min(axis=0))
    keys = np.zeros(BANDS, dtype=np.uint64)
    for number in range(ROWS):
        keys = (keys ^ least.reshape(BANDS, ROWS)[:, number]) * MIX[1]
        keys ^= keys >> np.uint64(31)
    return keys


def _texts(parts: Sequence[Part]) -> str:
    """What is said; system messages and results of tools are the same in many rows."""
    return "\n".join(part.text for part in parts if part.role in ("user", "assistant", "text"))
