"""What a human writes: the schema, how a file is read and checked, and what a resume may change."""
