"""The names of a base and its files in errors, and careful reading of its JSON files."""

import json
from pathlib import Path
from typing import Any

from finetune.errors import BaseError
from finetune.model.base.view import origin_of
from finetune.store import downloads

Json = dict[str, Any]
"""The content of another program's JSON file: an object, and nothing else is known."""


def read_json(path: Path) -> Json:
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise damaged(path, str(error)) from None
    except OSError as error:  # like a directory of that name
        raise damaged(path, str(error.strerror)) from None
    if not isinstance(value, dict):
        raise damaged(path, "it does not hold an object")
    return value


def damaged(path: Path, reason: str) -> BaseError:
    if downloads.is_pointer(path):
        message = f"its {path.name} is a pointer of Git LFS, not the file"
        return BaseError(message, where=name_of(path.parent), hint=downloads.PULL)
    return BaseError(
        f"its {path.name} is damaged: {reason}", where=name_of(path.parent), hint="download or copy it again"
    )


def name_of(path: Path) -> str:
    """The name of a base in errors: its Hub id if it is a snapshot in the Hub's cache, else the directory's name."""
    if origin := origin_of(path):
        return origin["name"]
    if path.parent.name == "snapshots":
        return path.parents[1].name.removeprefix("models--").replace("--", "/")
    return path.name
