"""The allowed content of a package: allowed names only, and nothing that runs, unpickles, or is a secret.

The first bytes of a file decide its kind, never its name.
"""

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from finetune.plan.encodings import TOKENIZER_FILES
from finetune.store.run.directory import JOURNAL, RECIPE
from finetune.store.run.shown import ProblemReport

CARD = "README.md"
ALLOWED = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.gguf",
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    *TOKENIZER_FILES,
    "chat_template.jinja",
    "chat_template.json",
    "*processor_config.json",
    CARD,
    "LICEN[SC]E*",
    "NOTICE*",
    "provenance.intoto.jsonl",
    "bom.cdx.json",
    "model.sig",
    "checkpoints.json",
    f"training/{RECIPE}",
    f"training/{JOURNAL}",
    "training/loss.png",
    "training/probe.json",
    ".eval_results/*.yaml",
    ".gitattributes",
)
TEXT = (".json", ".jsonl", ".jinja", ".yaml", ".md", ".txt", ".sig")
RUNS = {
    b"\x7fELF": "a program",
    b"MZ": "a program",
    b"#!": "a script",
    b"\xcf\xfa\xed\xfe": "a program",
    b"PK\x03\x04": "a zip archive",
}
PICKLE = re.compile(rb"\A\x80[\x02-\x05]")  # PROTO, the first opcode from protocol 2 on
OLD_PICKLE = re.compile(rb"\A[(\]}]?(c[\w.]+\n\w+\n|\(lp|\(dp)")  # protocols 0 and 1 are text
SECRETS = {
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{30,}",
    "an AWS key": r"\bA(KIA|SIA)[0-9A-Z]{16}\b",
    "a GitHub token": r"\bgh[pousr]_[A-Za-z0-9]{30,}|\bgithub_pat_\w{30,}",
    "an API key": r"\bsk-[A-Za-z0-9_-]{20,}",
    "a Google key": r"\bAIza[0-9A-Za-z_-]{35}",
    "a Slack token": r"\bxox[abprs]-[0-9A-Za-z-]{10,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
}
SECRET_NAMES = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_?KEY|CREDENTIAL", re.IGNORECASE)
SHORTEST_SECRET = 8
PLACE = re.compile(
    r"""(?<![\w.:/<])/(?:home|root|Users|mnt|tmp|var/(?:tmp|lib|folders)|data|workspace|scratch|srv)/[^\s"'<>]+"""
)


class Finding(NamedTuple):
    """A problem of a package. `file` is relative to it."""

    check: str
    file: str
    tensor: str | None
    message: str

    @property
    def report(self) -> ProblemReport:
        return {"check": self.check, "file": self.file, "tensor": self.tensor, "message": self.message}


def files_of(directory: Path) -> dict[str, Path]:
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path for path in paths}


def sha256(path: Path) -> str:
    """Digest of a file's content; read once in a process until the file changes."""
    status = path.stat()
    return _sha256_of(path, (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns))


@lru_cache(maxsize=4096)
def _sha256_of(path: Path, as_it_is: tuple[int, ...]) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def findings(directory: Path, environment: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Problems: files that do not belong in a package."""
    secret = secrets_of(environment)
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_symlink():
            yield Finding("symlink", name, None, "is a link: what it leads to is not in the package")
        elif path.is_file():
            if not any(fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in ALLOWED):
                yield Finding("allowed", name, None, "is no file of a package")
            yield from of_content(name, path, secret)
        elif not path.is_dir():
            yield Finding("allowed", name, None, "is neither a file nor a folder")


def secrets_of(environment: Mapping[str, str]) -> dict[str, str]:
    """Secrets in the environment of this process, by the name of their variable."""
    return {
        name: value
        for name, value in environment.items()
        if SECRET_NAMES.search(name) and len(value) >= SHORTEST_SECRET and not value.isdecimal() and "/" not in value
    }


def of_content(name: str, path: Path, secret: Mapping[str, str]) -> Iterator[Finding]:
    """Problems of a file's content: a forbidden kind under any name, a secret, a private path."""
    with path.open("rb") as file:
        head = file.read(4096)
    if what := next((what for magic, what in RUNS.items() if head.startswith(magic)), None):
        yield Finding("runs", name, None, f"is {what}")
    # the length of a safetensors header may begin like a pickle; `header` looks at what follows
    is_header = path.suffix == ".safetensors" and head[8:9] == b"{"
    if not is_header and (PICKLE.match(head) or OLD_PICKLE.match(head)):
        yield Finding("pickle", name, None, "is a pickle: loading it runs code")
    if path.suffix in TEXT or path.name.startswith(("LICEN", "NOTICE")):
        text = path.read_text(encoding="utf-8", errors="replace")
    elif path.suffix == ".safetensors":
        text = _header(path)
    else:
        return
    for what, pattern in SECRETS.items():
        if re.search(pattern, text):
            yield Finding("secret", name, None, f"holds {what}")
    for variable, value in secret.items():
        if value in text:
            yield Finding("secret", name, None, f"holds what {variable} is set to")
    if path.name != "tokenizer.json" and (match := PLACE.search(text)):  # a vocabulary may have any word
        yield Finding("private", name, None, f"names {match[0][:80]}, a place of somebody's machine")


def _header(path: Path) -> str:
    """The header of a safetensors file: its metadata can say anything."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return file.read(min(length, 100_000_000)).decode(errors="replace")
