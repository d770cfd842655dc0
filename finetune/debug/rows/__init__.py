"""The commands `data show`, `data check` and `data convert`: what rows become, what is wrong with them, and the rows as messages."""
