"""A fine-tuning pipeline in which every checkpoint is a commit."""

__version__ = "0.1.0"


def version(package: str) -> str:
    """The version of an installed package, or of this one: a checkout on PYTHONPATH has one, and is installed nowhere."""
    from importlib import metadata  # here: it takes a tenth of the time in which `--help` answers

    return __version__ if package == "finetune" else metadata.version(package)
