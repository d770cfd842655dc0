"""A run directory: its names, its journal, its columns, and who holds it."""
