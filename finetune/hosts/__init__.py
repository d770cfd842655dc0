"""Processes and machines: launchers, ranks, signals, health. Never imports torch."""
