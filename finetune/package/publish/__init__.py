"""A package on its way to the Hub or to a folder."""
