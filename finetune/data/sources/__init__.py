"""Rows of a source by position, from local files and from the Hub."""
