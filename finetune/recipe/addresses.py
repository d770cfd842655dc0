"""Addresses of mirrors, told apart from paths and Hub ids."""

import re

SCHEMES = ("s3", "gs", "hf", "file")
PATTERN = rf"({'|'.join(SCHEMES)})://[^\s?#@]+"
LIKE = "`s3://bucket/prefix`, `gs://bucket/prefix`, `hf://owner/name` or `file:///folder`"


def is_place(text: str) -> bool:
    """Whether a text is the address of a mirror, and not a path or a Hub id."""
    return text.startswith(tuple(f"{scheme}://" for scheme in SCHEMES))


def problem_of(text: str) -> str | None:
    """Why a text is not the address of a mirror. It does not repeat the text, which may have a password."""
    if not is_place(text):
        return f"must be like {LIKE}"
    if not re.fullmatch(PATTERN, text):
        return "must not have `@`, `?`, `#` or a space; credentials go into your environment"
    return None
