"""How a model writes its answers."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    max_new_tokens: int = 128
    """Of one answer, with its stop token."""
    temperature: float = 0.0
    """0 takes the likeliest token each time."""
    top_p: float = 1.0
    """Samples among the likeliest tokens that together have this probability (arXiv 1904.09751)."""
    seed: int = 0
    samples: int = 1
    """Answers to each question. Without a temperature they are all the same."""
    batch_size: int = 16
    """Answers written at once, where that is exact for the model."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer beside the model's stop tokens; they are no part of it."""
