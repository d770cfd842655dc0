"""Floor 7. Under which licence a base stands, as far as the base itself says; `export` asks, `card` passes it on.

Sources: the front matter of the base's own card, or the metadata in a GGUF file. Nothing is guessed: None means unknown.
"""

import importlib.metadata
from pathlib import Path

from finetune.checkpoints.refs import parse
from finetune.package import metadata
from finetune.recipe.schema import Base

KEYS = ("license", "license_name", "license_link")
TEXTS = ("LICEN[SC]E*", "NOTICE*")


def of_base(base: Base, directory: Path | None) -> dict[str, str] | None:
    """The licence keys of a model card: `license`, and the name and link that go with `other`."""
    ref = parse(base.checkpoint)
    found = _of_gguf(ref.repo, ref.path) if ref.kind == "package" else _of_card(directory) if directory else {}
    found = {key: found[key] for key in KEYS if isinstance(found.get(key), str)}
    return found if "license" in found else None


def texts(directory: Path) -> list[Path]:
    """The base's licence and notice files, which many licences want passed on."""
    return sorted(file for pattern in TEXTS for file in directory.glob(pattern) if file.is_file())


def _of_card(directory: Path) -> dict:
    card = directory / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    return metadata.read(text) or {}  # what cannot be read states nothing


def _of_gguf(package: str, file: Path) -> dict:
    """`general.license` and its kin (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md)."""
    import gguf

    carriers = importlib.metadata.packages_distributions().get(package.partition(".")[0], [])
    if not carriers:
        return {}
    path = importlib.metadata.distribution(carriers[0]).locate_file(Path(*package.split("."), file))
    fields = gguf.GGUFReader(path).fields
    names = {
        "license": "general.license",
        "license_name": "general.license.name",
        "license_link": "general.license.link",
    }
    return {key: fields[name].contents() for key, name in names.items() if name in fields}
