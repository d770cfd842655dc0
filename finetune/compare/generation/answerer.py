"""A model that is ready to answer: on its device, with its stop tokens, and asked as it was trained."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from finetune.data.gates import OF_ROWS
from finetune.model import base
from finetune.plan.plan import Plan
from finetune.recipe.schema.tasks import SECTIONS
from finetune.tasks import TASKS
from finetune.tasks.task import Ask
from finetune.training.opened import Opened, open_model, open_tokenizer


@dataclass(frozen=True)
class Answerer:
    ref: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    base_directory: Path
    stops: frozenset[int]
    positions: int | None
    """The longest question with its answer, in tokens; None where a model has no such limit."""
    converse: Ask | None
    """What a conversation is to it; None without a chat template."""
    go_on: Ask
    """What a text is to it that it continues."""
    is_conversational: bool
    """Whether a prompt is a user's message to it, and not a text to continue."""
    mixes_rows: bool
    """Whether its quantized layers look at all rows of a batch together."""


def open_answerer(ref: str) -> Answerer:
    """The model of a ref, on the device of this machine."""
    # ask whether a device is there: a build of torch for GPUs names its kind of device on any machine
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    # in fp32 a model of 14 billion parameters would take most of a large GPU
    opened = open_model(ref, device=device, dtype=None if device.type == "cpu" else torch.bfloat16)
    torch.nn.Module.to(opened.model, device)
    return answerer_of(opened, ref)


def answerer_of(opened: Opened, ref: str) -> Answerer:
    """An opened model, ready to answer. What its files say of sampling is dropped: the settings decide."""
    model, plan, tokenizer = opened.model, opened.plan, open_tokenizer(opened)
    model.generation_config = GenerationConfig()
    task = plan.recipe.task if plan else None
    # of an adapter's checkpoint, too: its model has the base's generation config
    stops = base.stop_tokens(opened.directory, tokenizer, task.stop_names if task else ())
    has_template = isinstance(tokenizer.chat_template, str)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 0
    return Answerer(
        ref,
        model,
        tokenizer,
        opened.base_directory,
        stops,
        positions if positions > 0 else None,
        _asking("conversation", plan, tokenizer, stops) if has_template else None,
        _asking("text", plan, tokenizer, stops),
        has_template and (task is None or task.row_form != "text"),
        bool(plan and plan.quantization == "int8"),
    )


def _asking(form: str, plan: Plan | None, tokenizer: PreTrainedTokenizerBase, stops: frozenset[int]) -> Ask:
    """How a model is asked with rows of a form: as the task of its run does it, or else as a task of that form does by itself."""
    name = next(name for name, section in SECTIONS.items() if section.row_form == form and TASKS[name].asker)
    task = SECTIONS[name].model_validate({"name": name})
    rules: dict[str, object] = {}
    if form == "conversation":
        rules |= {"template": tokenizer.chat_template, "date": plan.date if plan else None}
    if plan and plan.recipe.task.row_form == form and TASKS[plan.recipe.task.name].asker:
        name, task = plan.recipe.task.name, plan.recipe.task
        rules["row_rules"] = plan.row_rules
        if form == "conversation":
            rules["allowed"] = tuple(gate for gate in OF_ROWS if gate in plan.recipe.data.allow)
    asker = TASKS[name].asker
    assert asker  # of both kinds of tasks that get here
    return asker(tokenizer, task, stops, **rules)
