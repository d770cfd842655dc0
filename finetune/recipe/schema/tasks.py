"""The section `task`: one class a task, with its own keys and with what is known of it without torch.

What is done with rows is in `tasks/`, in the file of the task's name.
"""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from finetune.recipe.schema.values import Names, Packing, Section, Variable, members

CROSS_ENTROPY = {"loss": "held-out loss (nats per token)", "perplexity": "held-out perplexity"}

RESERVED = {"messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token"}
"""What a template is given of the row and the tokenizer."""


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

    @model_validator(mode="before")
    @classmethod
    def _auto_names_nothing(cls, given: object) -> object:
        if isinstance(given, Mapping) and given.get("packing") == "auto":
            return {name: value for name, value in given.items() if name != "packing"}
        return given

    @property
    def template_file(self) -> str | None:
        """The file of the key `template`, which tasks about conversations have."""
        return getattr(self, "template", None)

    @property
    def stop_names(self) -> list[str]:
        """The tokens of the key `stop`, which tasks about conversations have."""
        return getattr(self, "stop", [])


class ChatTask(TaskFacts):
    """Conversations; the loss is on assistant tokens only."""

    name: Literal["chat"]
    max_length: PositiveInt = 1024
    """Tokens of the longest example; longer rows are cut, and `plan` tells you how many and by how much."""
    packing: Packing = True
    """Packing puts several rows into one sequence and keeps them apart exactly. `auto`: packs if that is exact on your base, and pads if not. `true`: packs, or refuses your base. `false`: never packs. Changes speed, not the loss."""
    template: str | None = None
    """The chat template: a built-in one (`chatml`, `llama3`, `mistral`, `gemma`, `alpaca`, `zephyr`, `plain`, …), a file (Jinja), or `base:NAME` for one of several that the base has. Default: the base's own."""
    template_variables: dict[str, Variable] = {}
    """Values for the template's own switches, like `{enable_thinking: false}`. They travel with the template into checkpoints and packages."""
    stop: Names = []
    """Tokens that end the assistant's turn, if the base's end token is another, like `<|im_end|>`. Checkpoints and packages stop there, too."""
    learn: Literal["assistant", "last", "all"] = "assistant"
    """`assistant`: learn every assistant turn; `last`: the last one of a row; `all`: every token, the prompt included."""
    system: str | None = None
    """A system message for each row that has none."""

    @field_validator("template_variables")
    @classmethod
    def _are_names(cls, variables: dict[str, Variable]) -> dict[str, Variable]:
        for name in variables:
            if not name.isidentifier() or name in RESERVED:
                raise ValueError(f"`{name}` cannot be the name of a template's switch")
        return variables

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
    packing: Packing = True
    """Packing puts several rows into one sequence and keeps them apart exactly. `auto`: packs if that is exact on your base, and pads if not. `true`: packs, or refuses your base. `false`: never packs. Changes speed, not the loss."""

    row_form: ClassVar = "text"
    pipeline_tag: ClassVar = "text-generation"
    tags: ClassVar = ()
    prompt: ClassVar = '"…"'
    figures: ClassVar = CROSS_ENTROPY


Task = Annotated[ChatTask | TextTask, Field(discriminator="name")]

SECTIONS: dict[str, type[TaskFacts]] = members(Task)
