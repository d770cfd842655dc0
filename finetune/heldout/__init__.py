"""Floor 0. Held-out rows: which they are, and which runs trained on them."""
