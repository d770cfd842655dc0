"""Sources of tests: written, read whole, or refused."""

from pathlib import Path

import pytest

from finetune.data.sources.open import Rows, open_source
from finetune.errors import FinetuneError
from finetune.recipe.schema import Source


def written(path: Path, content: str | bytes) -> Source:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return Source(path=str(path))


def every(rows: Rows) -> list[dict[str, object]]:
    return [rows[index] for index in range(len(rows))]


def refusal(source: Source, kind: type[FinetuneError]) -> str:
    """The message of the error of this kind, of opening or of a row."""
    with pytest.raises(kind) as caught:
        every(open_source(source))
    return str(caught.value)
