"""A save, from live tensors to a commit."""
