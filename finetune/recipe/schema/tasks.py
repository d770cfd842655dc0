"""The section `task`: one class a task, with its own keys and with what is known of it without torch.

What is done with rows is in `tasks/`, in the file of the task's name.
"""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveInt

from finetune.recipe.schema.values import Section, members

CROSS_ENTROPY = {"loss": "held-out loss (nats per token)", "perplexity": "held-out perplexity"}


class TaskFacts(Section):
    """What every task states of itself; none of this is a key."""

    row_form: ClassVar[str]
    """What its rows are; one of `FORMS` in `data/preflight.py`, which looks at the first rows before torch is imported."""
    more_fields: ClassVar[tuple[str, ...]] = ()
    """Fields of a row beside those of that form."""
    pipeline_tag: ClassVar[str]
    """Of a model card: the pipeline of transformers that runs the model (https://huggingface.co/docs/hub/models-tasks)."""
    tags: ClassVar[tuple[str, ...]]
    """Of a model card."""
    prompt: ClassVar[str]
    """What the example on a model card gives to that pipeline, in Python."""

    figures: ClassVar[Mapping[str, str]]
    """What a model card calls each held-out figure; the score of the task has them by these names."""

    @property
    def template_file(self) -> str | None:
        """The file of the key `template`, which tasks about conversations have."""
        return getattr(self, "template", None)


class ChatTask(TaskFacts):
    """Conversations; the loss is on assistant tokens only."""

    name: Literal["chat"]
    max_length: PositiveInt = 1024
    """Tokens of the longest example; longer rows are cut, and `plan` tells you how many and by how much."""
    packing: bool = True
    """Packs several rows into one sequence and keeps them apart exactly; changes speed, not the loss."""
    template: str | None = None
    """A file with a chat template (Jinja) to use in place of the base's own."""

    row_form: ClassVar = "conversation"
    pipeline_tag: ClassVar = "text-generation"
    tags: ClassVar = ("conversational",)
    prompt: ClassVar = '[{"role": "user", "content": "…"}]'
    figures: ClassVar = CROSS_ENTROPY


class TextTask(TaskFacts):
    """Plain text (continued pretraining); the loss is on every token. Long rows become several examples."""

    name: Literal["text"]
    max_length: PositiveInt = 1024
    """Tokens of the longest example; longer rows are split, and you lose nothing."""
    packing: bool = True
    """Packs several rows into one sequence and keeps them apart exactly; changes speed, not the loss."""

    row_form: ClassVar = "text"
    pipeline_tag: ClassVar = "text-generation"
    tags: ClassVar = ()
    prompt: ClassVar = '"…"'
    figures: ClassVar = CROSS_ENTROPY


Task = Annotated[ChatTask | TextTask, Field(discriminator="name")]

SECTIONS: dict[str, type[TaskFacts]] = members(Task)
