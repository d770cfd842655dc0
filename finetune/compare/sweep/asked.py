"""From the options of `finetune sweep` to trials, or to everything that is wrong with them, before anything heavy is imported."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from finetune.compare.sweep import space as spaces
from finetune.compare.sweep.space import Range, Settings, Space
from finetune.compare.sweep.spec import asked_for, settings_of
from finetune.errors import Problem, RecipeError, counted
from finetune.recipe.load import LoadedRecipe, load, loads


@dataclass(frozen=True)
class Asked:
    """The options. Without `random` and `tpe` every combination is tried."""

    recipe: Path
    overrides: Sequence[str]
    random: int | None = None
    tpe: int | None = None
    seed: int = 0
    halving: int | None = None
    rungs: tuple[int, ...] = ()

    @property
    def method(self) -> str:
        return "random" if self.random else "tpe" if self.tpe else "grid"


@dataclass(frozen=True)
class Question:
    """What is asked, and found sound: the recipe, its space, and settings that stand for all trials."""

    asked: Asked
    loaded: LoadedRecipe
    space: Space
    settings: list[Settings]
    """Of every trial; of TPE, which decides them as it goes, each value and each end of a range."""

    @property
    def trials(self) -> int:
        return self.asked.tpe or len(self.settings)

    @property
    def record(self) -> dict[str, object]:
        """As `sweep.json` has it."""
        asked = self.asked
        return asked_for(self.space, asked.method, self.trials, asked.seed, (asked.halving, asked.rungs))

    def recipe_of(self, settings: Settings) -> LoadedRecipe:
        return loads(self.loaded.text, self.loaded.file, spaces.arguments(settings))


def checked(asked: Asked) -> Question:
    """RecipeError with every problem of the recipe, of the options, and of the settings of any trial."""
    space, problems = spaces.space_of(asked.overrides)
    problems += _of_options(asked, space)
    loaded: LoadedRecipe | None = None
    try:
        loaded = load(asked.recipe)
    except RecipeError as error:
        problems += error.problems
    if loaded is None:
        raise RecipeError(problems)
    settings = _settings(asked, space)
    if asked.random and spaces.size(space) is None and len(settings) < asked.random:
        hint = f"give at most {len(settings)}"
        problems.append(Problem("--random", "", f"the ranges have {counted(len(settings), 'trial')}", hint))
    question = Question(asked, loaded, space, settings)
    for each in settings:
        try:
            question.recipe_of(each)
        except RecipeError as error:
            problems += [_explained(problem, space) for problem in error.problems]
    if problems:
        raise RecipeError([*dict.fromkeys(problems)])
    return question


def _settings(asked: Asked, space: Space) -> list[Settings]:
    if asked.tpe or (asked.method == "grid" and spaces.size(space) is None):  # a grid with a range is refused
        return [*spaces.corners(space)]
    return settings_of(asked.method, space, asked.random or 0, asked.seed)


def _of_options(asked: Asked, space: Space) -> list[Problem]:
    """What is wrong with the options, beside the recipe."""
    found = [
        Problem("--set", key, "is a range, and a grid needs values", "list them like `[8, 16]`, or add --random N")
        for key, axis in space.items()
        if isinstance(axis, Range) and asked.method == "grid"
    ]
    tried = sum(len(axis.ends) > 1 for axis in space.values())
    size = spaces.size(space)
    if not tried:
        hint = "give a key several values, like `--set optimizer.learning_rate=[1e-4, 2e-4]`"
        found.append(Problem("--set", "", "there is nothing to try", hint))
    if asked.random and size and asked.random > size:
        hint = f"give at most {size}, or leave --random for all of them"
        found.append(Problem("--random", "", f"there are {counted(size, 'combination')}", hint))
    if asked.random and asked.tpe:
        found.append(Problem("--tpe", "", "does not go with --random", "choose one way to search"))
    if asked.halving and asked.tpe:
        message = "does not go with --tpe, which needs the final loss of each trial"
        found.append(Problem("--halving", "", message, "use --random N"))
    if asked.rungs and not asked.halving:
        found.append(Problem("--rungs", "", "goes with --halving", "add --halving 4"))
    if [*asked.rungs] != sorted(set(asked.rungs)):
        found.append(Problem("--rungs", "", "must rise, like `--rungs 20,80`"))
    return found


def _explained(problem: Problem, space: Space) -> Problem:
    """A list that should have been one value was taken for values to try."""
    axis = space.get(problem.key)
    is_of_list = problem.message.startswith(("must be a list", "must be two numbers"))
    if not is_of_list or axis is None or len(axis.ends) == 1:
        return problem
    return replace(problem, hint="a list has the values to try; write a list that is one value as `[[…]]`")
