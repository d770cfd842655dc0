"""Comparing models: `evaluate` gives figures of the same rows, `generate` answers to the same prompts."""
