"""Recipe to plan: pins revisions, encodes and counts rows, and refuses what cannot work before anything is trained.

On resume the pins of the run's own plan are used again, and the plan that comes out must be the same.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from finetune.data import preflight
from finetune.data.batches import Examples, select
from finetune.data.encode import Encoder, Work, encode
from finetune.data.example import Encoded
from finetune.data.heldout import draw
from finetune.data.heldout.draw import HeldOut
from finetune.data.heldout.lineage import source_key
from finetune.data.sources.hub import pin_dataset
from finetune.data.sources.open import State, located, open_source, reopen_source
from finetune.errors import AdapterError, DataError, Problem, RecipeError, RunError
from finetune.model import base
from finetune.model.base import templates
from finetune.plan import encodings, memory
from finetune.plan.plan import (
    ROW_RULES,
    PinnedBase,
    PinnedSource,
    Plan,
    Stage,
    keeps_fp32,
    order_of,
    steps_of,
    warmup_of,
)
from finetune.recipe.load import LoadedRecipe
from finetune.recipe.resume_rules import differences
from finetune.recipe.schema import ChatTask, Source, TextTask
from finetune.tasks import TASKS
from finetune.tasks.chat import template_of
from finetune.tasks.rendering import dates
from finetune.training.trial import arranged_like, count_parameters


@dataclass(frozen=True)
class Resolved:
    plan: Plan
    base_directory: Path
    """Config and tokenizer of the base; the weights too, once `base.directory` was asked for them."""
    tokenizer: PreTrainedTokenizerBase
    template: str | None
    """The chat template in force; None where rows are not conversations."""
    train: Examples
    holdout: Examples
    micro_batch_tokens: int
    """As the recipe says, or what `auto` stands for here; a run that exists keeps the one that it recorded."""
    held_out: HeldOut
    notes: tuple[str, ...] = ()
    """What was found out about the base that its user should know."""
    reached: dict[str, tuple[int, int]] | None = None
    """By kind of module the base's parameters, and those that the adapter reaches; None without an adapter."""
    stand_in: Path | None = None
    """A checkpoint with all weights, where the base is gone: what is loaded to be trained on."""

    @property
    def companions(self) -> base.Companions:
        return base.Companions(self.base_directory, self.template)


def resolve(
    loaded: LoadedRecipe,
    earlier: Plan | None = None,
    is_to_load: bool = False,
    like: Plan | None = None,
    stages: tuple[Stage, ...] | None = None,
    today: date | None = None,
    stand_in: Path | None = None,
) -> Resolved:
    """The plan of a recipe, with its examples. `earlier` is the plan of a run to resume: its pins hold, and nothing else may come out.

    `is_to_load`: the weights will be wanted, so they are read into memory while rows are encoded. `like` is the plan of a run to branch
    off: its pins hold for what the recipe has not changed, and `stages` are the runs that trained what the branch begins with. `today` is
    the day of a new plan, where it is not the clock's. `stand_in` has config and tokenizer of the base, which then is not needed.
    """
    recipe = loaded.recipe
    like = earlier or like
    is_same = like is not None and like.recipe.data == recipe.data
    if not is_same:
        preflight.check(loaded)
    pinned = like.base if like and like.recipe.base == recipe.base else base.pin(recipe.base)
    directory = stand_in or base.directory(recipe.base, pinned, with_weights=False)
    if is_to_load:
        base.read_ahead(directory)
    config = base.load_config(directory)
    tokenizer = base.load_tokenizer(directory)
    problems = _problems(loaded, config, tokenizer, pinned)
    if problems:
        raise RecipeError(problems)
    row_rules = like.row_rules if is_same else ROW_RULES
    task = TASKS[recipe.task.name]
    is_same_task = like is not None and (like.recipe.task, like.recipe.base) == (recipe.task, recipe.base)
    rules_of = like if is_same_task else None
    template, encoding = template_and_encoding(recipe.task, directory, tokenizer, row_rules, rules_of)
    others = templates.others(tokenizer.chat_template) if template and not recipe.task.template else []
    if shown := template or templates.default(tokenizer.chat_template):
        tokenizer.chat_template = shown
    day, given = dates(template, earlier, like if is_same_task else None, today)
    rendering = {"row_rules": row_rules} | ({} if template is None else {"template": template, "date": given})
    encoder = _encoder(directory, tokenizer, recipe.task, rendering)
    key = encodings.key(encoding, tokenizer, given)

    reopen = partial(_reopened, directory, recipe.task, rendering)

    def read(
        sources: Sequence[Source], pins: Sequence[PinnedSource] | None
    ) -> tuple[list[PinnedSource], list[Encoded]]:
        pairs = [
            _read(source, pin, encoder, key, reopen, known=known, content=task.content, row_rules=row_rules)
            for source, pin in zip(sources, pins or [None] * len(sources), strict=True)
        ]
        return [pair[0] for pair in pairs], [pair[1] for pair in pairs]

    known = {pin.name: pin for pin in (*like.train, *like.holdout)} if like else {}
    has_own_holdout = isinstance(recipe.data.holdout, list)
    train_pins, encoded = read(recipe.data.train, like.train if is_same else None)
    holdout_pins, holdout_encoded = (
        read(recipe.data.holdout, like.holdout if is_same else None) if has_own_holdout else ([], [])
    )
    sources = draw.sources(recipe, task.content, (train_pins, encoded), (holdout_pins, holdout_encoded))
    stages = draw.stages(recipe, earlier, stages)
    held_out = draw.held_out(recipe, sources, earlier, draw.origin(recipe, like, stages))
    train, train_counts = select(encoded, [pin.rows for pin in train_pins], held_out.untrained, is_kept=False)
    pins, examples = (holdout_pins, holdout_encoded) if has_own_holdout else (train_pins, encoded)
    holdout, holdout_counts = select(examples, [pin.rows for pin in pins], held_out.evaluated, is_kept=True)
    if not all(train.sizes):
        raise DataError("no row is left to train on", where=loaded.file, hint="hold out fewer rows, or give more")
    try:
        counted = count_parameters(recipe.adapter, directory)
    except AdapterError as error:
        raise RecipeError([loaded.problem(error.where, error.message, error.hint)]) from None
    arranged, notes = arranged_like(recipe, directory, like)
    earlier_orders = earlier.earlier_orders if earlier else ()
    steps = steps_of(recipe.train, order_of(recipe, train.sizes, earlier_orders))
    start = earlier.schedule_start if earlier else 0
    plan = Plan(
        recipe=recipe,
        base=pinned,
        train=tuple(train_pins),
        holdout=tuple(holdout_pins),
        encoding=encoding,
        counts=train_counts,
        holdout_counts=holdout_counts,
        sizes=train.sizes,
        steps=steps,
        warmup_steps=warmup_of(recipe, steps, start, earlier_orders),
        total_parameters=counted.total,
        trainable_parameters=counted.trainable,
        schedule_start=start,
        segments=earlier.segments if earlier else (),
        parent=earlier.parent if earlier else None,
        earlier_orders=earlier_orders,
        skipped_rows=earlier.skipped_rows if earlier else (),
        skipped_examples=earlier.skipped_examples if earlier else (),
        row_rules=row_rules,
        split=held_out.split,
        held_out=held_out.digest if earlier is None or earlier.held_out else "",
        stages=stages,
        seen=earlier.seen if earlier else (),
        arranged=arranged,
        date=day,
        keeps_fp32=keeps_fp32(recipe, like),
    )
    if earlier is not None:
        _refuse_change(earlier, plan)
    else:
        plan = draw.with_seen(plan, held_out, loaded.file)
    named = recipe.train.micro_batch_tokens
    if named == "auto":
        named = memory.micro_batch_tokens(plan, memory.shape_of(config), device())
    found = (*others, *counted.notes, *notes)
    return Resolved(plan, directory, tokenizer, template, train, holdout, named, held_out, found, counted.reached)


def device() -> memory.Device:
    """What this process trains on. Its whole memory, not what is free now: `plan`, `train` and all ranks must see the same."""
    world_size, beside = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if torch.accelerator.is_available():
        total = torch.accelerator.get_memory_info()[1]
        host = memory.machine_bytes()
        return memory.Device(total, is_gpu=True, world_size=world_size, host_bytes=host, processes=beside)
    return memory.Device(memory.machine_bytes() // beside, world_size=world_size)


def _refuse_change(earlier: Plan, plan: Plan) -> None:
    if earlier.plan_id == plan.plan_id:
        return
    old, new = earlier.model_dump(mode="json"), plan.model_dump(mode="json")
    changed = [
        f"{key}: {before} -> {after}" for key, before, after in differences(old, new) if not key.startswith("recipe.")
    ]
    changed = [line for line in changed if not line.startswith("held_out: ")] or changed  # follows from the others
    raise RunError(
        "what the run trains on has changed since it was planned:\n  " + "\n  ".join(changed),
        hint="restore the old files, or train on the new ones in a branch: `finetune branch RUN@STEP`",
    )


def _problems(
    loaded: LoadedRecipe, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, pinned: PinnedBase
) -> list[Problem]:
    """What base and recipe cannot do together; all of it at once."""
    recipe, problems = loaded.recipe, []
    text = config.get_text_config()
    longest = getattr(text, "max_position_embeddings", None) or 0
    if 0 < longest < recipe.task.max_length:  # XLNet's -1 is no bound
        message = f"{recipe.task.max_length} is more than the base's {longest} positions"
        problems.append(loaded.problem("task.max_length", message))
    if len(tokenizer) > text.vocab_size:
        message = f"its tokenizer has {len(tokenizer)} tokens, its model only {text.vocab_size}"
        problems.append(loaded.problem("base.checkpoint", message))
    if recipe.package.form == "adapter" and pinned.kind != "hub" and recipe.base.origin is None:
        problems.append(
            loaded.problem(
                "package.form",
                "an adapter of a local base would name a base that others do not have",
                "set base.origin to the Hub checkpoint it is equal to, or use `merged`",
            )
        )
    return problems


def in_force(plan: Plan, directory: Path, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The chat template that a plan trains with, for the tokenizer in a directory; what is there where rows are not conversations.

    DataError where that tokenizer and no template at hand are what the rows were encoded with.
    """
    task = plan.recipe.task
    template = templates.default(tokenizer.chat_template)
    for settings in [task.model_copy(update={"template": None}), task] if task.name == "chat" else [task]:
        if settings.name == "chat" and settings.template is None and template is None:
            continue
        found, encoding = template_and_encoding(settings, directory, tokenizer, plan.row_rules, plan)
        if encoding == plan.encoding:
            return template if found is None else found
    message = "the tokenizer or the chat template is not the one that the rows were encoded with"
    raise DataError(message, hint="restore the file that task.template names")


def template_and_encoding(
    task: ChatTask | TextTask,
    directory: Path,
    tokenizer: PreTrainedTokenizerBase,
    row_rules: int = ROW_RULES,
    like: Plan | None = None,
) -> tuple[str | None, str]:
    """The chat template in force, and a digest over what decides which tokens a row becomes, by the rules of a plan that exists."""
    stops = sorted(base.stop_tokens(directory, tokenizer))

    def pairs(text: str | None) -> list[tuple[str | None, str]]:
        if like is None or not encodings.is_older(like.encoding):
            return [(text, encodings.digest(task, base.tokenizer_files(directory), text, stops, row_rules))]
        texts = encodings.older_texts(text)
        return [(each, encodings.older_digest(task, directory, each, stops, row_rules)) for each in texts]

    def is_known(text: str) -> bool:
        return like is not None and like.encoding in dict(map(reversed, pairs(text)))

    found = pairs(template_of(tokenizer, task, is_known) if task.name == "chat" else None)
    return next((pair for pair in found if like and pair[1] == like.encoding), found[0])


def _read(
    source: Source,
    earlier: PinnedSource | None,
    encoder: Encoder,
    key: str,
    reopen: Callable[..., Work],
    *,
    known: Mapping[str, PinnedSource],
    content: Callable[[dict], object],
    row_rules: int,
) -> tuple[PinnedSource, Encoded]:
    revision = earlier.revision if earlier else (pin_dataset(source) if source.dataset else None)
    place = located(source, earlier or known.get(source.path))
    rows = open_source(place, revision, row_rules)
    pin = PinnedSource(name=source.path or rows.name, revision=revision, fingerprint=rows.fingerprint, rows=len(rows))
    # in memory, by each process that opens it
    is_held = place.path is not None and place.path.lower().endswith(".csv")
    again = None if is_held else partial(reopen, place, pin, rows.state)
    parts = (*source_key(source, pin), key)
    return pin, encode(rows, rows.where, encoder, *parts, content=content, reopen=again)


def _reopened(
    directory: Path, task: ChatTask | TextTask, rendering: dict, source: Source, pin: PinnedSource, state: State | None
) -> Work:
    """What encodes a source, made again in a worker process."""
    rows = reopen_source(source, pin, state, rendering["row_rules"])
    encoder = _encoder(directory, base.load_tokenizer(directory), task, rendering)
    return Work(rows, rows.where, encoder, TASKS[task.name].content)


def _encoder(
    directory: Path, tokenizer: PreTrainedTokenizerBase, task: ChatTask | TextTask, rendering: dict
) -> Encoder:
    return TASKS[task.name].encoder(tokenizer, task, base.stop_tokens(directory, tokenizer), **rendering)
