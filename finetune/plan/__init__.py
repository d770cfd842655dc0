"""What will happen: the frozen plan, and what follows from it. Pure: nothing here reads or writes a run."""
