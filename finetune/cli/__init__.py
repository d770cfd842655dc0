"""The command line: data goes to stdout, messages to stderr; `--help` and a recipe error import nothing heavy."""

from finetune.cli.main import cli, main

__all__ = ["cli", "main"]
