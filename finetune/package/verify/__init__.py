"""Whether a model folder is what it should be."""
