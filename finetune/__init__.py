"""A fine-tuning pipeline in which every checkpoint is a commit."""

__version__ = "0.1.0"
