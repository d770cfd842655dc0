"""The stated licences of base and data, and the licence that a package may have. It guesses nothing: None means unknown.

The kind of a licence decides its conditions (https://huggingface.co/docs/hub/repositories-licenses). This is no legal advice.
"""

import importlib.metadata
from fnmatch import fnmatchcase
from pathlib import Path

from finetune.errors import PackageError
from finetune.model.base import gguf
from finetune.package.card import metadata
from finetune.package.card.metadata import FrontMatter
from finetune.plan.plan import PinnedSource
from finetune.recipe.schema import Base, Package, Source
from finetune.store import hub
from finetune.store.checkpoints.refs import parse

KEYS = ("license", "license_name", "license_link")
GATE = "extra_gated_"  # the Hub's conditions for access
TEXTS = ("LICEN[SC]E*", "NOTICE*")
FREE = (
    *("apache-2.0", "mit", "bsd*", "isc", "zlib", "unlicense", "wtfpl", "bsl-1.0", "ncsa", "postgresql", "afl-3.0"),
    *("artistic-2.0", "ecl-2.0", "cc0-1.0", "cc-by-[234].[05]", "cdla-permissive-*", "odc-by", "pddl", "openmdw-1.0"),
)
ASKS = {  # the first match counts
    "cc-by*-nd-*": "does not allow changed versions to be passed on",
    "cc-by-nc-*": "forbids commercial use, also of works made from it",
    "fair-noncommercial-*": "forbids commercial use, also of works made from it",
    "*gpl*": "requires works made from it to stay under it",
    "cc-by-sa-*": "requires works made from it to stay under it",
    "[eo][us][pl]l-*": "requires works made from it to stay under it",
    "*": "has its own terms, and they also apply to works made from it",
}


Licence = FrontMatter
"""Keys of a model card's front matter: `license` and those that go with it."""


def of_base(base: Base, directory: Path | None) -> Licence | None:
    """The licence keys of a model card: `license`, the name and link of `other`, and the conditions of a gated base."""
    if base.checkpoint.startswith("package:"):  # a folder may be gone or moved, so its name is not looked up here
        ref = parse(base.checkpoint)
        found = _of_gguf(ref.repo, ref.path) if ref.kind == "package" else {}
    else:
        found = _of_card(directory) if directory else {}
    said = {key: found[key] for key in KEYS if isinstance(found.get(key), str)}
    return said | {key: found[key] for key in found if key.startswith(GATE)} if "license" in said else None


def of_package(asked: Package, base: Licence | None) -> Licence | None:
    """The licence keys of the package: the recipe's, or else the base's. Raises PackageError if the base's licence forbids it."""
    base_licence = base["license"] if base else None
    told = ASKS[next(pattern for pattern in ASKS if fnmatchcase(base_licence or "", pattern))]
    if base_licence and fnmatchcase(base_licence, "cc-by*-nd-*"):
        hint = "choose another base: the checkpoint can be used here, not packaged"
        raise PackageError(f"the base is under {base_licence}, which {told}", where="package.license", hint=hint)
    if asked.license is None:
        return base
    values = (asked.license, asked.license_name, asked.license_link)
    said = {key: value for key, value in zip(KEYS, values, strict=True) if value}
    front = "".join(f"{key}: {value}\n" for key, value in said.items())
    if wrong := next(metadata.problems(f"---\n{front}---\n"), None):
        raise PackageError(wrong, where="package.license", hint="take an id of the Hub, like apache-2.0 or other")
    is_free = base_licence is None or any(fnmatchcase(base_licence, pattern) for pattern in FREE)
    if not is_free and (asked.license != base_licence or _is_renamed(asked, base)):
        hint = f"leave package.license out: the package is then under {base_licence} as well"
        message = f"cannot be {asked.license}: the base is under {base_licence}, which {told}"
        raise PackageError(message, where="package.license", hint=hint)
    return {key: value for key, value in (base or {}).items() if key not in KEYS} | said


def _is_renamed(asked: Package, base: Licence | None) -> bool:
    """Whether the name differs: `other` means nothing without it."""
    return asked.license == "other" and asked.license_name != (base or {}).get("license_name")


def of_data(source: Source, pinned: PinnedSource) -> str | None:
    """The licence stated on the card of a Hub data set at its commit; the Hub's own cache keeps it."""
    if source.dataset is None:
        return None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        with hub.waiting(f"the card of the data set {source.dataset}"):
            card = hf_hub_download(source.dataset, "README.md", repo_type="dataset", revision=pinned.revision)
    # The card then says that it is unknown.
    except (HfHubHTTPError, hub.http().HTTPError, LocalEntryNotFoundError, OSError):
        return None
    said: object = (metadata.read(Path(card).read_text(encoding="utf-8", errors="replace")) or {}).get("license")
    return ", ".join(map(str, said)) if isinstance(said, list) else None if said is None else str(said)


def texts(directory: Path) -> list[Path]:
    """The base's licence and notice files; many licences require you to pass them on."""
    return sorted(file for pattern in TEXTS for file in directory.glob(pattern) if file.is_file())


def _of_card(directory: Path) -> Licence:
    card = directory / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    return metadata.read(text) or {}  # an unreadable file states nothing


def _of_gguf(package: str, file: Path) -> Licence:
    carriers = importlib.metadata.packages_distributions().get(package.partition(".")[0], [])
    if not carriers:
        return {}
    path = importlib.metadata.distribution(carriers[0]).locate_file(Path(*package.split("."), file))
    return dict(gguf.licence(Path(str(path))))
