"""The combinations of a source's keys that do not work, each as `key: message`, and a hint on its own line."""

from collections.abc import Iterator
from pathlib import PurePath

from finetune.recipe.schema.data import Data, Source
from finetune.recipe.schema.evaluation import Evaluate

TEXT_ENDINGS = (".txt", ".md", ".markdown", ".rst")
PACKED_ENDINGS = (".gz", ".zst", ".bz2", ".xz")


def problems(data: Data | None, evaluate: Evaluate | None) -> list[str]:
    """Those of all sources of a recipe."""
    parts: dict[str, object] = {f"data.{part}": getattr(data, part, None) for part in ("train", "holdout")}
    parts |= {f"evaluate.sets.{name}.rows": each.rows for name, each in (evaluate.sets if evaluate else {}).items()}
    found = []
    for part, sources in parts.items():
        for number, source in enumerate(sources if isinstance(sources, list) else []):
            found += [f"{part}[{number}].{problem}" for rule in RULES for problem in rule(source)]
    return found


def files_are_of_a_dataset(source: Source) -> Iterator[str]:
    if source.files and source.dataset is None:
        yield "files: goes with `dataset`, not with `path`\nhint: name several local files with a glob in `path`"
    if source.files and source.name is not None:
        yield "name: has no meaning beside `files`, which chooses the files itself\nhint: keep one of the two"
    for name in source.files:
        if name.startswith("/") or ".." in PurePath(name).parts:
            yield f"files: `{name}` is not a name in the data set\nhint: names begin at the data set's root"


def files_have_one_split(source: Source) -> Iterator[str]:
    names = [part.partition("[")[0].strip() for part in (source.split or "").split("+")]
    if source.files and source.split is not None and set(names) != {"train"}:
        yield (
            f"split: `{source.split}` has no meaning beside `files`: all of them are the split `train`\n"
            "hint: name only the files of that split, or a slice like `train[:100]`"
        )


def rows_are_of_text_files(source: Source) -> Iterator[str]:
    if source.row is None:
        return
    if source.dataset is not None and not source.files:
        yield "row: goes with text files, not with a data set of the Hub\nhint: name its text files with `files`"
    for name in (source.path or "", *source.files):
        ending = ending_of(name)
        if ending and ending not in TEXT_ENDINGS:
            yield f"row: goes with text files ({', '.join(TEXT_ENDINGS)}), not with `{ending}`\nhint: remove `row`"


def ending_of(name: str) -> str:
    """The ending that tells the format, before that of the compression; empty where the name has none, or a glob's."""
    path = PurePath(name)
    if path.suffix.lower() in PACKED_ENDINGS:
        path = path.with_suffix("")
    return "" if any(sign in path.suffix for sign in "*?[") else path.suffix.lower()


RULES = (files_are_of_a_dataset, files_have_one_split, rows_are_of_text_files)
