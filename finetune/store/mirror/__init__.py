"""A copy of a run in a bucket: pieces named by their content, then a record for each commit, written last."""
