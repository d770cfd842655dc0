"""The section `trackers`: a key for each tracker, with the keys it has.

How a tracker writes is in `training/trackers/`, in the file of its name.
"""

from finetune.recipe.schema.values import Section, StepCadence


class CsvTracker(Section):
    """A table in the run directory, `figures.csv`, for a spreadsheet or a plot."""

    every: StepCadence | None = None
    """Write a line every N steps, like `10 steps`. Evaluated steps always have one. Default: every step."""


class Trackers(Section):
    """Where the figures of a training also go. The journal has them all, whatever you choose here."""

    csv: CsvTracker | None = None
    """Without this section no table is written."""
