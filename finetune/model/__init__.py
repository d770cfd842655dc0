"""The parts of a model: base, adapters, optimizers, losses, attention."""
