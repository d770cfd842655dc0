"""Commands of a user of the loopback Hub."""

import os
import sys
from pathlib import Path

from tests import forks
from tests.hub.server import Hub


def environment(hub: Hub, home: Path, **more: str) -> dict[str, str]:
    """That of a user of this Hub, with an empty cache and no token."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    ours = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home / "huggingface"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "FINETUNE_CACHE": str(home / "cache"),
        "NO_PROXY": "127.0.0.1",
    }
    return kept | ours | more


def in_turn(env: dict[str, str], *commands: tuple[object, ...]) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each command."""
    results = []
    for command in commands:
        words = [sys.executable, "-m", "finetune", *map(str, command)]
        done = forks.run(words, env=env, capture_output=True, text=True, timeout=280)
        results.append((done.returncode, done.stdout, done.stderr))
    return results
