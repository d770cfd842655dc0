"""`sweep`: many trainings of one recipe with other settings, as a queue in a directory. Every trial is an ordinary run."""
