"""What a package says of its origin, and who signed it."""
