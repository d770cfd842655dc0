"""Finds our files in a target: those in the provenance of an earlier publish. All other files are people's, and stay.

It must name people's changes to our files before they are overwritten.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from finetune.errors import PublishError
from finetune.package.attest import provenance
from finetune.package.card.notes import with_text_of
from finetune.package.verify.contents import CARD

OURS = (provenance.FILE, "model.sig")
"""Not subjects of a provenance, and ours if there is one."""
SHOWN = 5


@dataclass(frozen=True)
class Sorted:
    """The changes of a publish to a target."""

    files: Mapping[str, Path | bytes]
    """Its new files: the package, its card with people's text."""
    gone: tuple[str, ...]
    """Files of an earlier publish, no longer in the package."""
    edited: tuple[str, ...]
    """Files changed or made by people: publishing would lose them."""


def sort_out(
    there: Collection[str],
    files: Mapping[str, Path | bytes],
    is_same: Callable[[str, Path | bytes], bool],
    read: Callable[[str], bytes],
    sha256_of: Callable[[str], str],
) -> Sorted:
    """`there` are the names in the target; the other arguments read their content. Only files about to change are read."""
    record = provenance.subjects(read(provenance.FILE)) if provenance.FILE in there else None
    ours: dict[str, str | None] = {} if record is None else {**record, **dict.fromkeys(OURS)}
    edited = []
    if CARD in there and CARD not in files and ours:
        ours[CARD] = None
        edited += [CARD] if with_text_of(read(CARD).decode(errors="replace"), "")[1] else []
    if CARD in there and CARD in files and not is_same(CARD, files[CARD]):
        content = files[CARD]
        new = content if isinstance(content, bytes) else content.read_bytes()
        text, is_edited = with_text_of(read(CARD).decode(errors="replace"), new.decode())
        files = {**files, CARD: text.encode()} if text.encode() != new else files
        edited += [CARD] if is_edited else []
    changed = [name for name in files if name in there and name != CARD and not is_same(name, files[name])]
    gone = [name for name in ours if name in there and name not in files]
    for name in [*changed, *gone]:
        if name not in ours or (ours[name] and sha256_of(name) != ours[name]):
            edited.append(name)
    return Sorted(files, tuple(sorted(gone)), tuple(sorted(edited)))


def refuse_edited(found: Sorted, where: str) -> None:
    if found.edited:
        more = f" and {len(found.edited) - SHOWN} more" if len(found.edited) > SHOWN else ""
        names = ", ".join(found.edited[:SHOWN]) + more
        hint = "copy what you want to keep, then use --replace; other files stay"
        raise PublishError(f"would overwrite what people changed or added: {names}", where=where, hint=hint)
