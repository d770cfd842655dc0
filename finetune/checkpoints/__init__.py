"""Floor 0. Durable, verified checkpoints: a manifest, a store that commits by one rename, and what refers to and removes them."""
