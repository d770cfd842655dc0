"""Comparing models: figures on the same rows, and answers to the same prompts."""

from finetune import also_a_command

also_a_command(__name__)
