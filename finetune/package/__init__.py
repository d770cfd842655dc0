"""A checkpoint becomes a model folder for others: `export` writes it, `proof` loads it back, `card` describes it."""
