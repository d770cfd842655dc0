"""Checks of a model folder."""
