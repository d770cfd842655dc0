"""Where the figures of a training also go.

A tracker `x` of the recipe is the `start` of the file `x.py` here, and its section in `recipe/schema/trackers.py`.
"""

from collections.abc import Callable, Sequence
from importlib.util import find_spec

from finetune.errors import Problem, RecipeError
from finetune.recipe.schema.trackers import TrackerFacts


def refuse_absent(track: Sequence[TrackerFacts], problem: Callable[[str, str, str], Problem]) -> None:
    """RecipeError for each tracker of a recipe whose client is not installed. `problem` takes key, message and hint."""
    problems = [
        problem(
            f"track[{index}]",
            f"`{tracker.name}` needs the package `{tracker.package}`, which is not installed",
            f"pip install 'finetune[{tracker.name}]'",
        )
        for index, tracker in enumerate(track)
        if tracker.package and not _is_installed(tracker.package)
    ]
    if problems:
        raise RecipeError(problems)


def _is_installed(package: str) -> bool:
    # A folder of the client's files, like `wandb/`, looks like a package without a file.
    spec = find_spec(package)
    return spec is not None and spec.origin is not None
