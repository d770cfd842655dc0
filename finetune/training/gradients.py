"""Trained tensors that a step gave no gradient: they stay as they are, however long the training is."""

from finetune.errors import counted
from finetune.training.state import TrainState

SHOWN = 5


def lacking(state: TrainState) -> tuple[str, ...]:
    """Their names, between a backward pass and its update. After the exchange of gradients, on every rank the same."""
    return tuple(name for name, each in state.trainable.items() if each.grad is None)


def told(state: TrainState, names: tuple[str, ...]) -> str:
    """How many they are, how much of what is trained, and which."""
    trained = state.trainable
    total, idle = (sum(trained[name].numel() for name in each) for each in (trained, names))
    shown = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
    return f"{counted(len(names), 'trained tensor')} got no gradient, {idle / total:.2g} of what is trained: {shown}"
