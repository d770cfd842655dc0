"""A checkpoint becomes a model folder for others: written, loaded back, described, published."""
