"""Shared code for requests to the Hub: its client's errors, the meaning of each refusal, and a message while it is silent."""

import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

from finetune.store.rank import is_first

NAME = r"[A-Za-z0-9][\w.-]*"
HUB_ID = re.compile(rf"{NAME}/{NAME}")
QUIET_SECONDS = 4.0
LONGEST_PAUSE_SECONDS = 60.0
LATER = "try again later: the fault is the Hub's or a proxy's"
# What a status means, and what to do about it (RFC 9110; https://huggingface.co/docs/hub/rate-limits).
MEANINGS = {
    400: ("bad request", "correct what the Hub names"),
    401: ("not authorized", "set HF_TOKEN to a valid token, or run `hf auth login`"),
    402: ("payment required", "the owner's plan or storage is used up: look at its billing page on the Hub"),
    403: ("forbidden", "use a token that may do this for this owner, or ask the owner for access"),
    404: ("not found", "check the name and the revision; what is private needs HF_TOKEN"),
    409: ("conflict", "somebody else changes it at this moment: try again"),
    410: ("gone", "it was removed from the Hub: name another one"),
    412: ("changed meanwhile", "look at what was committed there, then try again"),
    413: ("too large", "send less: smaller shards with package.max_shard_bytes"),
    422: ("not accepted", "correct what the Hub names"),
    429: ("too many requests", "wait a few minutes; with HF_TOKEN set the limits are higher"),
    451: ("unavailable for legal reasons", "name another one"),
}


@dataclass(frozen=True)
class Refusal:
    """Why a request to the Hub failed."""

    message: str
    hint: str | None
    """None if the Hub did not answer."""
    status: int | None


def http() -> ModuleType:
    """The HTTP library of `huggingface_hub`, which passes its errors on: httpx2 since version 2, httpx before."""
    from huggingface_hub.errors import HfHubHTTPError

    return sys.modules[HfHubHTTPError.__mro__[1].__module__.partition(".")[0]]


def refusal(error: BaseException) -> Refusal:
    """Why a request failed, by the status of the Hub's answer; libraries wrap that error in others."""
    answered, status = _answered(error)
    if answered is None or status is None:
        reason = str(error.__cause__ or error).strip().partition("\n")[0] or type(error).__name__
        return Refusal(f"the Hub cannot be reached: {reason}", None, None)
    told = (getattr(answered, "server_message", None) or str(answered)).strip().partition("\n")[0]
    if status >= 500:
        return Refusal(f"the Hub is out of order: {told} ({status})", LATER, status)
    meaning, hint = MEANINGS.get(status, ("refused", "correct what the Hub names"))
    return Refusal(f"the Hub refuses: {told} ({status}, {meaning})", hint, status)


def _answered(error: BaseException | None) -> tuple[BaseException | None, int | None]:
    """The error with the Hub's answer (this one, or one of its causes), and the status."""
    while error is not None:
        if (response := getattr(error, "response", None)) is not None:
            return error, response.status_code
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None, None


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Prints a message after a few seconds without the Hub's answer, and again after twice as long each time."""
    is_over, begin = threading.Event(), time.monotonic()

    def say() -> None:
        pause = QUIET_SECONDS
        while not is_over.wait(pause):
            waited = round(time.monotonic() - begin)
            print(f"waiting for the Hub for {waited} s: {what}", file=sys.stderr, flush=True)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    speaker = threading.Thread(target=say, name="hub", daemon=True)
    if is_first(os.environ):  # the other ranks wait for this one
        speaker.start()
    try:
        yield
    finally:
        is_over.set()
        if speaker.ident:
            speaker.join()


@contextmanager
def without_remarks() -> Iterator[None]:
    """Silences expected warnings of the client, to keep our own lines whole; errors still raise."""
    from huggingface_hub.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
