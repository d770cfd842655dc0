"""Text from models: what is given to them, in which batches, token by token. Commands and metrics stand on it; it prints nothing."""
