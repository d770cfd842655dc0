"""Recipes: their schema, reading and checking a file, and the rules for a resume."""
