"""Addresses of mirrors, told apart from paths and Hub ids."""

SCHEMES = ("s3", "gs", "hf", "file")


def is_place(text: str) -> bool:
    """Whether a text is the address of a mirror, and not a path or a Hub id."""
    return text.startswith(tuple(f"{scheme}://" for scheme in SCHEMES))
