"""What `publish` prints with `--json`, and what the Hub says of a repository."""

from typing import NotRequired, TypedDict


class PublishedFile(TypedDict):
    name: str
    bytes: int


class Published(TypedDict):
    """What `publish --json` prints; the keys that it may lack are those of a repository."""

    target: str
    revision: str | None
    """None where there is none yet, and nothing was published."""
    uploaded_bytes: int
    commits: int
    files: list[PublishedFile]
    overwritten: list[str]
    """What people had changed."""
    is_dry_run: bool
    user: NotRequired[str]
    is_new: NotRequired[bool]
    private: NotRequired[bool]
    branch: NotRequired[str]
    tag: NotRequired[str | None]
    changes: NotRequired[dict[str, str]]


class Visibility(TypedDict):
    private: bool
    gated: bool | str
