"""Durable, verified checkpoints."""
