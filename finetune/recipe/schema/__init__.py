"""The schema of a recipe: one frozen pydantic model a section, one docstring a key.

Keys, error messages, the JSON Schema and `docs/recipe.md` all come from here. It must not import torch, so you see a typo at once.
"""

from finetune.recipe.schema.adapters import Adapter, FrozenAdapter, LoraAdapter
from finetune.recipe.schema.base import Base
from finetune.recipe.schema.data import Data, Holdout, Source, drawn_of, is_drawn
from finetune.recipe.schema.evaluation import HELD_OUT, Evaluate, EvaluationSet
from finetune.recipe.schema.mirror import Mirror
from finetune.recipe.schema.optimizers import Optimizer
from finetune.recipe.schema.package import Package, Publish
from finetune.recipe.schema.recipe import Recipe
from finetune.recipe.schema.rope import Rope
from finetune.recipe.schema.tasks import ChatTask, Task, TextTask
from finetune.recipe.schema.training import Best, Checkpoint, EarlyStopping, Ema, Guard, Judged, Keep, KeepWhole, Train
from finetune.recipe.schema.values import Every, Section, amount_of, count_of

__all__ = [
    "Adapter",
    "Base",
    "Best",
    "ChatTask",
    "Checkpoint",
    "Data",
    "Ema",
    "EarlyStopping",
    "Evaluate",
    "EvaluationSet",
    "Every",
    "FrozenAdapter",
    "Guard",
    "HELD_OUT",
    "Holdout",
    "Judged",
    "Keep",
    "KeepWhole",
    "LoraAdapter",
    "Mirror",
    "Optimizer",
    "Package",
    "Publish",
    "Recipe",
    "Rope",
    "Section",
    "Source",
    "Task",
    "TextTask",
    "Train",
    "amount_of",
    "count_of",
    "drawn_of",
    "is_drawn",
]
