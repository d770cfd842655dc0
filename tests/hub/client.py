"""Commands of a user of the loopback Hub, in processes of their own: `huggingface_hub` reads the address of its Hub once, at import."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.hub.server import Hub

RUN_IN_TURN = """
import contextlib, io, json, sys
from finetune.cli import main
results = []
for arguments in json.loads(sys.argv[1]):
    sys.argv, printed, said, code = ["finetune", *arguments], io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(said):
        try:
            main()
        except SystemExit as end:
            code = end.code
    results.append([code, printed.getvalue(), said.getvalue()])
print(json.dumps(results))
"""


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
    """Exit code, stdout and stderr of each command; all in one process, as starting one takes seconds."""
    arguments = json.dumps([[str(part) for part in command] for command in commands])
    command = [sys.executable, "-c", RUN_IN_TURN, arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr  # it ends with the traceback
    return [tuple(result) for result in json.loads(done.stdout)]
