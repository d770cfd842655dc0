"""Tools that run steps of a plan to answer a question about it, each in a file of its own."""
