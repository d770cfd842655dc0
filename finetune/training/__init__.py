"""From a recipe to a trained run: resolve, resume, the loop, what is recorded and saved."""
