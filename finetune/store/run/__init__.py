"""A run directory: its names, its journal, the losses of its rows, and its holder."""
