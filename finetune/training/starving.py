"""Experts that get next to no tokens, and so learn next to nothing."""

from collections.abc import Mapping, Sequence

import numpy as np

EVEN = 500  # tokens of an even share that are awaited before the first judgement; by chance, an expert then gets 20 more or fewer
STARVING = 0.02  # of an even share
SHOWN = 6  # layers of a message


class Loads:
    """The tokens of experts since the last judgement. Each judgement waits for twice as many as the one before, and tells only news."""

    def __init__(self) -> None:
        self._tokens: dict[str, np.ndarray] = {}
        self._even = EVEN
        self._told: set[tuple[str, int]] = set()

    def add(self, step: Mapping[str, Sequence[int]]) -> str | None:
        """Of a step, by layer and expert. Returns what to say of experts that starve; None if there is nothing new."""
        for layer, tokens in step.items():
            self._tokens[layer] = self._tokens.get(layer, 0) + np.array(tokens, dtype=np.int64)
        if not self._tokens or min(each.mean() for each in self._tokens.values()) < self._even:
            return None
        found = {
            layer: [int(expert) for expert in np.flatnonzero(tokens < STARVING * tokens.mean())]
            for layer, tokens in self._tokens.items()
        }
        new = {(layer, expert) for layer, experts in found.items() for expert in experts} - self._told
        told = _told(self._tokens, {layer: each for layer, each in found.items() if each}) if new else None
        self._told |= new
        self._tokens, self._even = {}, 2 * self._even
        return told


def _told(tokens: Mapping[str, np.ndarray], found: Mapping[str, Sequence[int]]) -> str:
    """Each starving expert by its layer and number, with its share of what an even router would send it."""
    parts = []
    for layer, experts in list(found.items())[:SHOWN]:
        counts, even = tokens[layer], tokens[layer].mean()
        named = [f"{expert} ({counts[expert]:,} of {even:,.0f})" for expert in experts[:SHOWN]]
        more = f" and {len(experts) - SHOWN} more" if len(experts) > SHOWN else ""
        parts.append(f"{layer}: expert {', '.join(named)}{more}")
    rest = f"; {len(found) - SHOWN} more layers" if len(found) > SHOWN else ""
    return f"experts starve, with tokens of an even share: {'; '.join(parts)}{rest}"
