"""A checkpoint becomes a model folder for others: written, loaded back, described, published."""

from finetune import also_a_command

also_a_command(__name__)
