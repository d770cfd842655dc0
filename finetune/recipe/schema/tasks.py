"""The section `task`: one class a task, with that task's own keys."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from finetune.recipe.schema.values import Section


class ChatTask(Section):
    """Conversations; the loss is on assistant tokens only."""

    name: Literal["chat"]
    max_length: PositiveInt = 1024
    """Tokens of the longest example; longer rows are cut, and `plan` says how many and by how much."""
    packing: bool = True
    """Several rows in one sequence, kept apart exactly; changes speed, not the loss."""
    template: str | None = None
    """A file with a chat template (Jinja) to use in place of the base's own."""


class TextTask(Section):
    """Plain text (continued pretraining); the loss is on every token. Long rows become several examples."""

    name: Literal["text"]
    max_length: PositiveInt = 1024
    """Tokens of the longest example; longer rows are divided, nothing is lost."""
    packing: bool = True
    """Several rows in one sequence, kept apart exactly; changes speed, not the loss."""


Task = Annotated[ChatTask | TextTask, Field(discriminator="name")]
