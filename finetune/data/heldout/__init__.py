"""Held-out rows."""
