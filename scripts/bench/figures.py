"""What the benchmarks measured, in a form that a person and a machine read: samples by contestant, and the goals they are held to."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import median

import numpy as np

OURS = "finetune"
SCALES = {"ms": 1e3, "s": 1.0, "%": 1e2, "GB/s": 1.0, "MB": 1e-6}


@dataclass
class Quantity:
    """One thing that was measured of several contestants: seconds, shares, bytes or GB/s; `unit` is how it is shown."""

    title: str
    unit: str
    samples: dict[str, list[float]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    """A remark beside a contestant's figures."""

    def add(self, contestant: str, sample: float) -> None:
        self.samples.setdefault(contestant, []).append(sample)

    def median(self, contestant: str = OURS) -> float:
        return median(self.samples[contestant])

    def p99(self, contestant: str = OURS) -> float:
        """Below a hundred samples this lies close to the largest one."""
        return float(np.percentile(self.samples[contestant], 99))

    def show(self) -> str:
        width = max(len(name) for name in self.samples) + 2
        lines = [f"\n{self.title} ({self.unit})"]
        lines += [f"{'':{width}}{'median':>10}{'p99':>10}{'min':>10}{'max':>10}{'n':>5}{'x ours':>9}"]
        lines += [self._line(name, width) for name in self.samples]
        return "\n".join(line.rstrip() for line in lines)

    def _line(self, name: str, width: int) -> str:
        scale, samples = SCALES[self.unit], self.samples[name]
        figures = (self.median(name), self.p99(name), min(samples), max(samples))
        shown = "".join(
            f"{figure * scale:10.3g}" if abs(figure * scale) < 1e3 else f"{figure * scale:10.0f}" for figure in figures
        )
        ratio = self._ratio(name)
        return f"{name:{width}}{shown}{len(samples):5d}{'' if ratio is None else f'{ratio:.3g}':>9}  {self.notes.get(name, '')}"

    def _ratio(self, name: str) -> float | None:
        """How many times ours; None where ours was not measured, or shares are compared that may be zero or below."""
        if self.unit == "%" or not self.samples.get(OURS) or not self.median():
            return None
        return self.median(name) / self.median()

    def record(self) -> dict:
        rows = {
            name: {
                "median": self.median(name),
                "p99": self.p99(name),
                "count": len(samples),
                "times_ours": self._ratio(name),
                "note": self.notes.get(name),
                "samples": samples,
            }
            for name, samples in self.samples.items()
        }
        return {"title": self.title, "shown_in": self.unit, "contestants": rows}


@dataclass(frozen=True)
class Goal:
    """A figure that was promised."""

    name: str
    value: float
    limit: float
    unit: str
    is_floor: bool = False
    """Whether the limit must be passed, not kept."""

    @property
    def is_reached(self) -> bool:
        return self.value >= self.limit if self.is_floor else self.value <= self.limit

    def show(self) -> str:
        scale = SCALES.get(self.unit, 1.0)
        sign = ">=" if self.is_floor else "<="
        verdict = "reached" if self.is_reached else "MISSED"
        return f"{verdict:8} {self.name}: {self.value * scale:.3g} {self.unit} (goal {sign} {self.limit * scale:.3g})"

    def record(self) -> dict:
        return asdict(self) | {"is_reached": self.is_reached}


@dataclass
class Part:
    """One part of the report."""

    quantities: list[Quantity]
    goals: list[Goal]
    facts: dict[str, object] = field(default_factory=dict)

    def show(self) -> str:
        facts = [
            f"{name}: {value:,}" if isinstance(value, int) else f"{name}: {value}" for name, value in self.facts.items()
        ]
        return "\n".join(
            [*(quantity.show() for quantity in self.quantities), "", *facts, *(goal.show() for goal in self.goals)]
        )

    def record(self) -> dict:
        return {
            "facts": self.facts,
            "quantities": [quantity.record() for quantity in self.quantities],
            "goals": [goal.record() for goal in self.goals],
        }


def rotated(names: Sequence[str], turn: int) -> list[str]:
    """The names in another order each turn, so that none always follows the same one."""
    start = turn % len(names)
    return [*names[start:], *names[:start]]
