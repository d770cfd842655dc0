"""Renders a new chat template in a process with limits, before anything else renders it.

A template is a program by the base's authors. The sandbox of transformers keeps it away from files and code (CVE-2024-34359, CVE-2026-5760
hit renderers without one). It does not limit time and memory.
"""

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from typing import TYPE_CHECKING

from finetune import version
from finetune.store import cache

if TYPE_CHECKING:
    from jinja2 import Template

LONGEST = 200_000  # characters; the longest in use are about 20,000
CPU_SECONDS = 2
MEMORY_BYTES = 256 << 20  # beyond what the imports take
WALL_SECONDS = 60
QUESTION = [{"role": "user", "content": "What is a checkpoint good for?"}]
ANSWERED = [*QUESTION, {"role": "assistant", "content": "To go on from."}]
CONVERSATIONS = [QUESTION, ANSWERED, [{"role": "system", "content": "Be brief."}, *ANSWERED, *ANSWERED]]


def texts(chat_template: object) -> list[str]:
    """The templates of a tokenizer or its config: one, or several by name."""
    if isinstance(chat_template, dict):
        return [text for text in chat_template.values() if isinstance(text, str)]
    if isinstance(chat_template, list):
        return [one["template"] for one in chat_template if isinstance(one, dict) and "template" in one]
    return [chat_template] if isinstance(chat_template, str) else []


def is_known_form(chat_template: object) -> bool:
    """Whether it is a template, several by name, or none."""
    found = chat_template.values() if isinstance(chat_template, dict) else [chat_template or ""]
    return all(isinstance(text, str) for text in found)


def default(chat_template: object, name: str = "default") -> str | None:
    """Of what a tokenizer has, the template that a conversation is rendered with; None without one, or without one of that name."""
    is_named = isinstance(chat_template, dict) or name != "default"
    found = chat_template.get(name) if isinstance(chat_template, dict) else None if is_named else chat_template
    return clean(found) if isinstance(found, str) and found else None


def others(chat_template: object) -> list[str]:
    """A line about unused templates, if there are any."""
    left = [f"`{name}`" for name in names(chat_template) if name != "default"]
    return [f"the base has several chat templates: `default` is trained with, not {', '.join(left)}"] if left else []


def names(chat_template: object) -> list[str]:
    """The names of several templates; a single one has none."""
    return sorted(chat_template) if isinstance(chat_template, dict) else []


def decoded(data: bytes) -> str:
    """The template in a file; ValueError names the line that is not UTF-8."""
    try:
        return clean(data.decode())
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"is not UTF-8: line {line} has the byte 0x{data[error.start]:02x}") from None


def clean(template: str) -> str:
    """Without a byte-order mark, which would be in every row, and with the line ends of a file read as text."""
    return template.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def problem(template: str) -> str | None:
    """Why a template must not be rendered, or None. The cache keeps the finding, by the template's text."""
    if len(template) > LONGEST:
        return f"has {len(template):,} characters, more than {LONGEST:,}"
    facts = [template, CONVERSATIONS, CPU_SECONDS, MEMORY_BYTES, version("transformers")]
    try:
        return cache.found("templates", facts, lambda: _tried(template))
    except _Unfinished as error:  # it may be this machine's fault: not kept
        return str(error)


class _Unfinished(Exception):
    """The rendering process ended by itself, or did not."""


def _tried(template: str) -> str | None:
    # It needs no network and no secret; -P: without it the program's own folder comes first on the import path.
    environment = {
        name: os.environ[name] for name in ("PATH", "PYTHONPATH", "HOME", "VIRTUAL_ENV") if name in os.environ
    }
    try:
        done = subprocess.run(
            [sys.executable, "-P", __file__],
            input=json.dumps(template),
            env=environment | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=WALL_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise _Unfinished(f"takes more than {WALL_SECONDS} seconds to render") from None
    if done.returncode == -signal.SIGXCPU:
        return f"takes more than {CPU_SECONDS} seconds of a processor to render a short conversation"
    if done.returncode:
        raise _Unfinished(f"ends the process that renders it, with exit code {done.returncode}")
    return json.loads(done.stdout)


def main() -> None:
    """Reads a template as JSON, and writes why it must not be rendered, or null."""
    # The very sandbox that training renders in.
    from transformers.utils.chat_template_utils import _compile_jinja_template

    template = json.load(sys.stdin)
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(used.ru_utime + used.ru_stime) + 1 + CPU_SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    with open("/proc/self/statm", encoding="ascii") as file:
        pages = int(file.read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY_BYTES,) * 2)
    print(json.dumps(_rendered(template, _compile_jinja_template)))


def _rendered(template: str, compiled: Callable[[str], "Template"]) -> str | None:
    """Renders every conversation. A template may refuse some, if it renders another."""
    from jinja2 import TemplateError
    from jinja2.exceptions import SecurityError

    refusals = []
    for messages, is_asked in product(CONVERSATIONS, (False, True)):
        try:
            compiled(template).render(messages=messages, add_generation_prompt=is_asked, bos_token="", eos_token="")
        except SecurityError as error:
            return f"reaches for what the sandbox forbids: {error}"
        except MemoryError:
            return f"needs more than {MEMORY_BYTES >> 20} MiB to render a short conversation"
        except RecursionError:
            return "calls itself without end"
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            refusals.append(f"{type(error).__name__}: {error}".partition("\n")[0])
    return f"renders no conversation: {refusals[0]}" if len(refusals) == 2 * len(CONVERSATIONS) else None


if __name__ == "__main__":
    main()
