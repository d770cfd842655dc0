"""Secrets by forms that their issuers document: prefixes, lengths, checksums. Prose and placeholders are not hit."""

import base64
import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator

from finetune.recipe.yaml_nodes import Plain

LEAST_BITS = 3.0  # entropy a character; words and placeholders have less
PLACEHOLDERS = re.compile(
    r"example|xxxx|\*\*\*|your|placeholder|dummy|redacted|1234567|abcdefg|<|changeme|secret|passw|(.)\1{4}", re.I
)
BASE62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def secrets_in(text: str) -> Iterator[tuple[str, str]]:
    """Name and text of each secret."""
    seen = set()
    for hint, pattern, name, is_real in FORMS:
        if hint not in text:
            continue
        for match in pattern.finditer(text):
            found = match[match.lastindex or 0]
            if found not in seen and is_real(found):
                seen.add(found)
                yield name, found


def secrets_of(value: Plain, key: str = "") -> Iterator[tuple[str, str]]:
    """Key and kind of each secret among a recipe's values."""
    if isinstance(value, dict):
        for name, child in value.items():
            yield from secrets_of(child, f"{key}.{name}" if key else name)
    elif isinstance(value, list):
        for index, child in enumerate(value):
            yield from secrets_of(child, f"{key}[{index}]")
    elif isinstance(value, str):
        kinds = [name for name, _ in secrets_in(value)]
        # Elsewhere 40 hexadecimal digits are the commit of a base or a data set.
        if key.startswith(("track", "mirror")):
            kinds += [name for pattern, name in OF_TRACKERS if pattern.search(value)]
        yield from ((key, name) for name in kinds[:1])


def is_random(text: str) -> bool:
    """Whether the characters look drawn at random, and not like words or a placeholder."""
    counts = Counter(text)
    bits = -sum(count / len(text) * math.log2(count / len(text)) for count in counts.values())
    is_mixed = any(sign.isdigit() for sign in text) or len({sign.isupper() for sign in text}) == 2
    return bits >= LEAST_BITS and is_mixed and not PLACEHOLDERS.search(text)


def _has_checksum(text: str) -> bool:
    """GitHub and npm: the last six characters are the CRC32 of those between prefix and them, in base 62.

    https://github.blog/engineering/platform-security/behind-githubs-new-authentication-token-formats/
    """
    body = text.partition("_")[2]
    number = zlib.crc32(body[:-6].encode())
    digits = ""
    while number:
        number, digit = divmod(number, 62)
        digits = BASE62[digit] + digits
    return body[-6:] == digits.rjust(6, "0")


def _is_token(text: str) -> bool:
    """JSON Web Tokens: the first part is JSON that names an algorithm (RFC 7519)."""
    head = text.partition(".")[0]
    try:
        facts = json.loads(base64.urlsafe_b64decode(head + "=" * (-len(head) % 4)))
    except ValueError:
        return False
    return isinstance(facts, dict) and "alg" in facts


def _has_key(text: str) -> bool:
    body = "".join(line for line in text.split() if ":" not in line)
    return len(body) >= 64 and is_random(body[:400])


OF_TRACKERS = (
    (re.compile(r"\b[0-9a-f]{40}\b"), "a Weights & Biases key"),
    (re.compile(r"://[^\s/@]*:[^\s/@]+@"), "a password in an address"),
)

# a text that has to be there, the form, what it is, and whether a match is real
FORMS: tuple[tuple[str, re.Pattern[str], str, Callable[[str], bool]], ...] = tuple(
    (hint, re.compile(pattern), name, is_real)
    for hint, pattern, name, is_real in (
        (
            "PRIVATE KEY",
            r"-----BEGIN (?:[A-Z]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----((?:\s*[A-Za-z-]{4,20}: [^\n]{1,100}\n){0,4}[\s\\A-Za-z0-9+/=]{64,20000})-----END",
            "a private key",
            _has_key,
        ),
        (
            "A",
            r"(?<![A-Za-z0-9+/])((?:AKIA|ASIA)[A-Z2-7]{16})(?![A-Za-z0-9+/])",
            "an AWS access key",
            lambda text: is_random(f"{text}0"),
        ),
        ("gh", r"\b(gh[pousr]_[A-Za-z0-9]{36})\b", "a GitHub token", _has_checksum),
        ("github_pat_", r"\b(github_pat_[A-Za-z0-9]{22}_[A-Za-z0-9]{59})\b", "a GitHub token", is_random),
        ("npm_", r"\b(npm_[A-Za-z0-9]{36})\b", "an npm token", _has_checksum),
        ("glpat-", r"\b(glpat-[A-Za-z0-9_-]{20,})\b", "a GitLab token", is_random),
        ("hf_", r"\b(hf_[A-Za-z]{34})\b", "a Hugging Face token", lambda text: is_random(f"{text}0")),
        ("sk-ant-", r"\b(sk-ant-[a-z0-9]+-[A-Za-z0-9_-]{80,})", "an Anthropic API key", is_random),
        (
            "sk-",
            r"\b(sk-(?:proj-|svcacct-|admin-)?[A-Za-z0-9_-]{20,}T3BlbkFJ[A-Za-z0-9_-]{20,})",
            "an OpenAI API key",
            is_random,
        ),
        ("AIza", r"\b(AIza[A-Za-z0-9_-]{35})(?![A-Za-z0-9_-])", "a Google API key", is_random),
        ("xox", r"\b(xox[abposr]-[0-9]{8,}-[A-Za-z0-9-]{20,})\b", "a Slack token", is_random),
        (
            "hooks.slack.com",
            r"hooks\.slack\.com/services/(T[A-Z0-9]{7,}/B[A-Z0-9]{7,}/[A-Za-z0-9]{20,})",
            "a Slack webhook",
            is_random,
        ),
        ("_live_", r"\b((?:sk|rk)_live_[A-Za-z0-9]{24,})\b", "a Stripe key", is_random),
        ("wandb_v1_", r"\b(wandb_v1_[A-Za-z0-9_]{40,})\b", "a Weights & Biases key", is_random),
        ("pypi-", r"\b(pypi-AgEIcHlwaS5vcmc[A-Za-z0-9_-]{50,})", "a PyPI token", is_random),
        ("SG.", r"\b(SG\.[A-Za-z0-9_-]{22}\.[A-Za-z0-9_-]{43})(?![A-Za-z0-9_-])", "a SendGrid key", is_random),
        ("dop_v1_", r"\b(dop_v1_[a-f0-9]{64})\b", "a DigitalOcean token", is_random),
        ("AccountKey=", r"AccountKey=([A-Za-z0-9+/]{86}==)", "an Azure storage key", is_random),
        (":AA", r"\b([0-9]{8,10}:AA[A-Za-z0-9_-]{33})(?![A-Za-z0-9_-])", "a Telegram bot token", is_random),
        ("eyJ", r"\b(eyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{20,})", "a JSON Web Token", _is_token),
        (
            "://",
            r"\b[a-z][a-z0-9+.-]{1,20}://[^\s:/@'\"`<>]{1,64}:([^\s:/@'\"`<>{}$]{10,64})@[\w.-]+",
            "a password in an address",
            is_random,
        ),
    )
)
