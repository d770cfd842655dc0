"""Comparing models: figures on the same rows, and answers to the same prompts."""
