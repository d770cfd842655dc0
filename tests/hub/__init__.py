"""A Hugging Face Hub on the loopback, in memory: what `huggingface_hub` and `datasets` ask a Hub for when they read.

`repos` is what it holds, `server` how it answers, with faults on demand; stories drive the real client against it.
By hand, until it is stopped: `python -m tests.hub --port 8000 --model owner/name=DIRECTORY`.
"""

from tests.hub.repos import Repo
from tests.hub.server import Hub

__all__ = ["Hub", "Repo"]
