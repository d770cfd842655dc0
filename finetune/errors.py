"""Every failure that a user can meet, as one tree; printed by `cli`; and numbers in sentences.

FinetuneError                exit 1   what happened, where, and on its own line what to do
├── RecipeError              exit 2   all problems of a recipe at once, each with file, line and key
├── DataError                         rows that are missing, empty or of the wrong shape
├── BaseError                         a base checkpoint that is not there or cannot be trained
├── AdapterError             exit 2   an adapter that does not fit the base
├── RunError                          a run directory that is unwritable or of another recipe
│   └── RunInUseError                 a run directory that another process writes
├── CheckpointError                   a checkpoint that is missing, damaged, foreign or from the future
├── LostRankError                     another process of the training has ended, or does not answer
├── DivergedError                     processes of a training that came to different results
├── NotFiniteError                    a loss or gradient norm that is not a number: the step was refused
├── PackageError                      a package that is not what was trained, or has what must not go out
├── PublishError                      a Hub or a folder that refuses, or ends up with something else
└── MirrorError                       a mirror that cannot be reached, is damaged, or belongs to another run
Stopped                      exit 143, 130 or 129: a signal asked for the end, and the last finished step is committed
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass


class FinetuneError(Exception):
    """An expected failure: catch this one to catch them all."""

    code = "error"
    exit_code = 1

    def __init__(self, message: str, *, where: str | None = None, hint: str | None = None):
        self.message = message
        self.where = where
        self.hint = hint
        super().__init__(str(self))

    def __str__(self) -> str:
        first = f"{self.where}: {self.message}" if self.where else self.message
        return f"{first}\nhint: {self.hint}" if self.hint else first


def of_libraries() -> tuple[type[Exception], ...]:
    """What libraries raise for a model that they cannot handle. Without MemoryError, which is about this machine.

    Called in an `except` clause, so that nothing is imported until something is raised.
    """
    from huggingface_hub.errors import StrictDataclassError  # of a config; it is no ValueError

    return (
        ArithmeticError,
        AssertionError,
        AttributeError,
        ImportError,
        LookupError,
        NameError,
        OSError,
        RuntimeError,
        TypeError,
        ValueError,
        StrictDataclassError,
    )


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a recipe: `where` is FILE:LINE, `key` the dotted recipe key."""

    where: str
    key: str
    message: str
    hint: str | None = None

    def __str__(self) -> str:
        first = f"{self.where}: {self.key}: {self.message}" if self.key else f"{self.where}: {self.message}"
        return f"{first}\nhint: {self.hint}" if self.hint else first


class RecipeError(FinetuneError):
    """All problems of a recipe; str() has one block a problem, in the order of the lines."""

    code = "recipe"
    exit_code = 2

    def __init__(self, problems: list[Problem]):
        self.problems = problems
        super().__init__("\n".join(map(str, problems)))
        self.where, self.hint = problems[0].where, problems[0].hint

    def __str__(self) -> str:
        return self.message


class DataError(FinetuneError):
    """`parts` are the errors of single rows or files that this one is made of."""

    code = "data"

    def __init__(
        self,
        message: str,
        *,
        where: str | None = None,
        hint: str | None = None,
        parts: "Sequence[DataError]" = (),
    ):
        super().__init__(message, where=where, hint=hint)
        self.parts = list(parts)


class BaseError(FinetuneError):
    code = "base"


class AdapterError(FinetuneError):
    code = "adapter"
    exit_code = 2


@contextmanager
def explained(
    message: str, where: str, hint: str | None = None, kind: type[FinetuneError] = BaseError
) -> Iterator[None]:
    """The boundary around one call of transformers or peft: whatever that raises is one error with its cause. Our own pass."""
    try:
        yield
    except FinetuneError:
        raise
    except of_libraries() as error:
        cause = " ".join(str(error).split())
        told = f"{type(error).__name__}: {cause[:CAUSE]}{'…' if len(cause) > CAUSE else ''}"
        raise kind(f"{message} ({told})", where=where, hint=hint or UNKNOWN) from error


CAUSE = 240  # characters of a cause that are shown
UNKNOWN = "choose another base, or another version of transformers"


class RunError(FinetuneError):
    code = "run"


class RunInUseError(RunError):
    pass


class CheckpointError(FinetuneError):
    code = "checkpoint"


class LostRankError(FinetuneError):
    """Nothing is wrong with this rank: `launch` looks for another one that began it."""

    code = "lost_rank"


class DivergedError(FinetuneError):
    code = "diverged"


class NotFiniteError(FinetuneError):
    code = "not_finite"


class PackageError(FinetuneError):
    code = "package"


class Stopped(Exception):
    """A signal asked for the end; `exit_code` is 128 + its number."""

    def __init__(self, signal_number: int):
        self.exit_code = 128 + signal_number
        super().__init__(f"stopped by signal {signal_number}")


class PublishError(FinetuneError):
    code = "publish"


class MirrorError(FinetuneError):
    code = "mirror"


UNITS = ((86_400, "day"), (3_600, "hour"), (60, "minute"), (1, "second"))


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """`1 commit`, `2 commits`, `12,000 steps`; `plural` where it is not the noun with an s."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def duration(seconds: float) -> str:
    """`12 seconds`, `3 minutes`, `2 days`: in the largest unit of which there are two, or the smallest."""
    size, unit = next((each for each in UNITS if seconds >= 2 * each[0]), UNITS[-1])
    return counted(round(seconds / size), unit)
