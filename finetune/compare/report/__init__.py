"""The report of runs: one page that needs nothing else, and the same page while they train."""
