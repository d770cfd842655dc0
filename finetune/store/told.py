"""What is said and written down of a client, without what may be a secret."""

import os
import re

from finetune.recipe.secret_forms import secrets_in

_SECRET_NAMES = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
_IN_ADDRESS = re.compile(r"://[^\s/@]+@")
_LENGTH = 300
_LEAST_SECRET = 6  # characters; a shorter value is a word


def told(error: BaseException) -> str:
    """One line."""
    return without_secrets(" ".join(f"{type(error).__name__}: {error}".split()))[:_LENGTH]


def without_secrets(line: str) -> str:
    secrets = [
        value for name, value in os.environ.items() if _SECRET_NAMES.search(name) and len(value) >= _LEAST_SECRET
    ]
    for secret in [*secrets, *(found for _, found in secrets_in(line))]:
        line = line.replace(secret, "…")
    return _IN_ADDRESS.sub("://…@", line)
