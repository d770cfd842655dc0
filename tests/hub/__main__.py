"""The loopback Hub for trying by hand: set HF_ENDPOINT to the address it prints, and HF_HUB_DISABLE_XET=1."""

import argparse
import time
from pathlib import Path

from tests.hub import Hub

parser = argparse.ArgumentParser(prog="python -m tests.hub", description=__doc__)
parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
parser.add_argument("--seconds", type=float, default=3600, help="how long it stays up")
for kind in ("model", "dataset"):
    parser.add_argument(f"--{kind}", action="append", default=[], metavar="OWNER/NAME=DIRECTORY")
arguments = parser.parse_args()

with Hub(port=arguments.port, seconds=arguments.seconds) as hub:
    for kind in ("model", "dataset"):
        for named in getattr(arguments, kind):
            name, _, directory = named.partition("=")
            hub.add(kind, name).commit_directory(Path(directory))
    print(hub.url, flush=True)
    try:
        while hub.is_up:
            time.sleep(0.2)
    except KeyboardInterrupt:
        pass
