"""Tools that answer a question about a run by running its steps again."""
