"""A fine-tuning pipeline in which every checkpoint is a commit. The commands are functions of it: `finetune.train("recipe.yaml")`."""

import importlib
import sys
from functools import cache
from types import ModuleType

__version__ = "0.1.0"
VERBS = ("compare", "evaluate", "package", "plan", "train")


@cache  # of a package it parses all metadata, and a training asks 28 times: a fifth of what its start costs
def version(package: str) -> str:
    """The version of an installed package, or of this one: a checkout on PYTHONPATH has one, and is installed nowhere."""
    from importlib import metadata  # here: it takes a tenth of the time in which `--help` answers

    return __version__ if package == "finetune" else metadata.version(package)


def __getattr__(name: str) -> object:
    """The commands, and the error that they raise. Looked up late: `import finetune` must not import what they need."""
    if name in VERBS:
        return getattr(importlib.import_module("finetune.cli.functions"), name)
    if name == "FinetuneError":
        return importlib.import_module("finetune.errors").FinetuneError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def also_a_command(module: str) -> None:
    """Makes a subpackage with the name of a command callable: importing it hides the function of that name."""
    sys.modules[module].__class__ = _Command


class _Command(ModuleType):
    def __call__(self, *arguments: object, **settings: object) -> object:
        name = self.__name__.rpartition(".")[2]
        return getattr(importlib.import_module("finetune.cli.functions"), name)(*arguments, **settings)
