"""The tasks: how rows become examples, examples a batch, a batch a loss, and losses figures.

A task `x` of the recipe is the `TASK` of the file `x.py` here, and its section in `recipe/schema/tasks.py`.
"""

from importlib import import_module

from finetune.recipe.schema.tasks import SECTIONS
from finetune.tasks.task import Task

TASKS: dict[str, Task] = {name: import_module(f"{__name__}.{name}").TASK for name in SECTIONS}
