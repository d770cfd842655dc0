"""Finds out before a training whether its result could be packaged.

It runs the checks of a package on everything known by then: config, tokenizer, template, generation config, licence. A small model
of the base's kind shows faults of classes, names and types of weights.
"""

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from finetune import version
from finetune.errors import BaseError, PackageError
from finetune.package import in_small, small_files
from finetune.package.attest import licence
from finetune.package.verify import contents
from finetune.package.verify.checks import CHECKS
from finetune.package.verify.folder import Folder
from finetune.store import cache
from finetune.training.resolve import Resolved

RULES = 3  # of the questions below; part of the cache key
BEFORE = ("config", "remote_code", "vocabulary", "tokenizer", "template")


def refuse_unpackageable(resolved: Resolved) -> None:
    """Raises PackageError if the recipe has a `package` or `publish` section; otherwise prints a line on stderr."""
    plan = resolved.plan
    sections = plan.recipe.model_dump(mode="json", include={"base", "package", "adapter"})
    facts = [
        RULES,
        sections,
        plan.recipe.train.precision,
        plan.base.model_dump(mode="json"),
        plan.encoding,
        *map(version, ("finetune", "transformers")),
    ]
    problems: list[str] = cache.found("packageable", facts, lambda: list(_problems(resolved)))
    try:
        small: str | None = cache.found("packageable in small", facts, lambda: in_small.problem(resolved))
        if small:
            problems = [*problems, small]
    except BaseError as error:
        told = f"whether this run can be packaged could not be tried in small: {error.message}"
        print(told, file=sys.stderr, flush=True)
    if problems and plan.recipe.model_fields_set & {"package", "publish"}:
        hint = "fix it now: the package would be refused for it after the training"
        raise PackageError("; ".join(problems), where="package", hint=hint)
    for problem in problems:
        print(f"this run could not be packaged as it is: {problem}", file=sys.stderr, flush=True)


def _problems(resolved: Resolved) -> Iterator[str]:
    recipe = resolved.plan.recipe
    try:
        licence.of_package(recipe.package, licence.of_base(recipe.base, resolved.base_directory))
    except PackageError as error:
        yield f"{error.where}: {error.message}"
    with tempfile.TemporaryDirectory() as made:
        directory = Path(made)
        config = json.loads((resolved.base_directory / "config.json").read_bytes())
        config = {key: value for key, value in config.items() if key != "_name_or_path"}  # a package has none
        (directory / "config.json").write_text(json.dumps(config))
        tokenizer = resolved.tokenizer
        small_files.write(directory, resolved.base_directory, tokenizer, resolved.base_directory)
        if change := small_files.change_by_loading(directory, tokenizer):
            yield f"tokenizer: {change}"
        folder = Folder(directory)
        found = [*contents.findings(directory), *(item for name in BEFORE for item in CHECKS[name](folder))]
        for check, file, _, message in dict.fromkeys(found):
            yield f"{check}: {file}: {message}"
