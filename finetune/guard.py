"""Floor 0. Tells a spike from noise. The window is the journal's last steps, so it survives a resume without being stored.

`run` asks after every step and acts as `guard.spike` in the recipe says.
"""

import statistics
from collections.abc import Sequence

WINDOW = 128  # steps looked back on
ENOUGH = 32  # steps before which nothing is called a spike
LIMIT = 8.0  # robust standard deviations; a window of Gaussian noise passes it about once in 10^15 steps
NOISE_FLOOR = 0.02  # of the median: a very quiet stretch does not turn small changes into spikes


def spike(history: Sequence[float], value: float) -> float | None:
    """How many robust standard deviations (1.4826 x median absolute deviation) `value` lies above the window, if too many."""
    window = history[-WINDOW:]
    if len(window) < ENOUGH:
        return None
    median = statistics.median(window)
    deviation = 1.4826 * statistics.median(abs(past - median) for past in window)
    distance = (value - median) / max(deviation, NOISE_FLOOR * abs(median), 1e-12)
    return distance if distance > LIMIT else None
