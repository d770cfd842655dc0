"""The frozen plan, and forecasts from it. Pure: nothing here reads or writes a run."""
