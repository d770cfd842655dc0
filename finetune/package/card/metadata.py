"""The front matter of a card by the rules of the Hub. If it breaks one, the Hub refuses a commit or shows a model wrongly.

Rules: https://huggingface.co/docs/hub/model-cards, licences: https://huggingface.co/docs/hub/repositories-licenses (read in November 2026).
"""

import re
from collections.abc import Iterator
from typing import Any

from ruamel.yaml import YAML, YAMLError

from finetune.store.hub import HUB_ID

FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*(\n|\Z)", re.DOTALL)
LANGUAGE = re.compile(r"[a-z]{2,3}|multilingual|code")  # ISO 639-1, -2 or -3; no regions
RELATIONS = ("adapter", "merge", "quantized", "finetune")
LICENCES = frozenset(
    [
        "apache-2.0",
        "mit",
        "openrail",
        "bigscience-openrail-m",
        "creativeml-openrail-m",
        "bigscience-bloom-rail-1.0",
        "bigcode-openrail-m",
        "afl-3.0",
        "artistic-2.0",
        "bsl-1.0",
        "bsd",
        "bsd-2-clause",
        "bsd-3-clause",
        "bsd-3-clause-clear",
        "c-uda",
        "cc",
        "cc0-1.0",
        "cc-by-2.0",
        "cc-by-2.5",
        "cc-by-3.0",
        "cc-by-4.0",
        "cc-by-sa-3.0",
        "cc-by-sa-4.0",
        "cc-by-nc-2.0",
        "cc-by-nc-3.0",
        "cc-by-nc-4.0",
        "cc-by-nd-4.0",
        "cc-by-nc-nd-3.0",
        "cc-by-nc-nd-4.0",
        "cc-by-nc-sa-2.0",
        "cc-by-nc-sa-3.0",
        "cc-by-nc-sa-4.0",
        "cdla-sharing-1.0",
        "cdla-permissive-1.0",
        "cdla-permissive-2.0",
        "wtfpl",
        "ecl-2.0",
        "epl-1.0",
        "epl-2.0",
        "etalab-2.0",
        "eupl-1.1",
        "eupl-1.2",
        "agpl-3.0",
        "gfdl",
        "gpl",
        "gpl-2.0",
        "gpl-3.0",
        "lgpl",
        "lgpl-2.1",
        "lgpl-3.0",
        "isc",
        "h-research",
        "intel-research",
        "lppl-1.3c",
        "ms-pl",
        "apple-ascl",
        "apple-amlr",
        "mpl-2.0",
        "odc-by",
        "odbl",
        "openmdw-1.0",
        "openrail++",
        "osl-3.0",
        "postgresql",
        "ofl-1.1",
        "ncsa",
        "unlicense",
        "zlib",
        "pddl",
        "lgpl-lr",
        "deepfloyd-if-license",
        "fair-noncommercial-research-license",
        "llama2",
        "llama3",
        "llama3.1",
        "llama3.2",
        "llama3.3",
        "llama4",
        "gemma",
        "unknown",
        "other",
    ]
)


FrontMatter = dict[str, Any]
"""Keys of a card, whatever whoever wrote it put there."""


def read(card: str) -> FrontMatter | None:
    """The front matter of a card; None if there is none, or it is not a map."""
    match = FRONT_MATTER.match(card)
    try:
        value = YAML(typ="safe", pure=True).load(match[1]) if match else None
    except YAMLError:
        return None
    return value if isinstance(value, dict) else None


def problems(card: str) -> Iterator[str]:
    """Problems: values that the Hub refuses or misreads."""
    metadata = read(card)
    if metadata is None:
        yield "has no front matter that can be read"
        return
    yield from (f"`{key}` is empty" for key, value in metadata.items() if value is None or value in ("", []))
    for licence in _listed(metadata.get("license")):
        if licence not in LICENCES:
            yield f"has the licence {licence!r}, which the Hub does not know; use `other` with license_name and license_link"
        if licence == "other" and "license_name" not in metadata:
            yield "has the licence `other` without a license_name"
    for key in ("base_model", "datasets", "new_version"):
        for value in _listed(metadata.get(key)):
            if not HUB_ID.fullmatch(str(value)):
                yield f"`{key}` is {value!r}, which is no id of the Hub"
    for language in _listed(metadata.get("language")):
        if not LANGUAGE.fullmatch(str(language)):
            yield f"has the language {language!r}, which is no ISO 639 code"
    if metadata.get("base_model_relation", "finetune") not in RELATIONS:
        yield f"has the base_model_relation {metadata['base_model_relation']!r}, not one of {', '.join(RELATIONS)}"
    if not all(isinstance(tag, str) for tag in _listed(metadata.get("tags"))):
        yield "has tags that are not words"


def _listed(value: object) -> list[object]:
    return value if isinstance(value, list) else [] if value is None else [value]
