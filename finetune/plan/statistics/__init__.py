"""What held-out rows can tell: intervals, paired tests and verdicts. Pure functions of arrays, with numpy alone; every draw is seeded."""
