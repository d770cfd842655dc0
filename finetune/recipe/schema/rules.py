"""The combinations of sections that do not work.

A rule looks at its sections and returns a problem as `key: message`, or None. It is skipped if one of its sections is invalid.
"""

from dataclasses import dataclass
from typing import Protocol

from finetune.recipe.schema import figure_rules, mixing, source_rules
from finetune.recipe.schema.adapters import SECTIONS, Adapter
from finetune.recipe.schema.base import Base
from finetune.recipe.schema.data import Data, has_holdout
from finetune.recipe.schema.evaluation import Evaluate
from finetune.recipe.schema.mirror import Mirror
from finetune.recipe.schema.optimizers import OPTIMIZERS, SCHEDULES, Optimizer
from finetune.recipe.schema.package import Package, Publish
from finetune.recipe.schema.tasks import Task
from finetune.recipe.schema.trackers import Track
from finetune.recipe.schema.training import Checkpoint, Guard, Train
from finetune.recipe.schema.values import amount_of

PEFT = " or ".join(f"`adapter: {{name: {name}}}`" for name, adapter in SECTIONS.items() if adapter.is_peft)
SHARDED = ("fsdp", "hsdp")
"""The values of `train.strategy` that spread rows over devices."""


@dataclass(frozen=True)
class Unread:
    """Stands for an adapter section that is wrong, where None means that there is none."""


@dataclass(frozen=True)
class PartlyRead:
    """The sections of a recipe that are right."""

    base: Base | None = None
    task: Task | None = None
    data: Data | None = None
    adapter: Adapter | Unread | None = Unread()
    optimizer: Optimizer | None = None
    train: Train | None = None
    evaluate: Evaluate | None = None
    checkpoint: Checkpoint | None = None
    guard: Guard | None = None
    track: Track | None = None
    mirror: Mirror | None = None
    package: Package | None = None
    publish: Publish | None = None

    @property
    def lacks_rows(self) -> bool:
        """Whether surely no rows are held out."""
        return self.data is not None and not has_holdout(self.data)

    @property
    def trains_the_base(self) -> bool:
        """Whether surely weights of the base are trained, and not matrices beside them."""
        return not isinstance(self.adapter, Unread) and not (self.adapter and self.adapter.is_peft)


class Sharded(Protocol):
    """What decides whether rows can be spread, of a recipe that is read in part or whole."""

    @property
    def base(self) -> Base | None: ...
    @property
    def optimizer(self) -> Optimizer | None: ...
    @property
    def train(self) -> Train | None: ...


def problems(recipe: PartlyRead) -> list[str]:
    """What does not fit together, as `key: message`; some with a hint on its own line."""
    return [
        *(problem for rule in RULES if (problem := rule(recipe))),
        *figure_rules.problems(recipe.task, recipe.evaluate, recipe.checkpoint, recipe.train),
        *source_rules.problems(recipe.data, recipe.evaluate),
    ]


def sources_can_be_mixed(recipe: PartlyRead) -> str | None:
    return mixing.problem(recipe.data) if recipe.data else None


def train_has_a_length(recipe: PartlyRead) -> str | None:
    train = recipe.train
    return "train: needs `epochs` or `steps`" if train and train.epochs is None and train.steps is None else None


def optimizer_has_its_settings(recipe: PartlyRead) -> str | None:
    if (optimizer := recipe.optimizer) is None:
        return None
    for chosen, family in ((optimizer.name, OPTIMIZERS), (optimizer.schedule, SCHEDULES)):
        foreign = {key for facts in family.values() for key in facts.keys} - {*family[chosen].keys}
        for key, field in Optimizer.model_fields.items():
            if key in foreign and getattr(optimizer, key) != field.default:
                return f"optimizer.{key}: has no meaning for `{chosen}`"
    return None


def the_floor_is_below_the_peak(recipe: PartlyRead) -> str | None:
    if (optimizer := recipe.optimizer) is None:
        return None
    floor, peak = amount_of(optimizer.min_learning_rate, optimizer.learning_rate), optimizer.learning_rate
    return f"optimizer.min_learning_rate: {floor:g} is above the peak, {peak:g}" if floor > peak else None


def evaluation_has_rows(recipe: PartlyRead) -> str | None:
    if recipe.evaluate is None or not recipe.lacks_rows:
        return None
    asked = next((name for name in ("every", "sets") if getattr(recipe.evaluate, name)), None)
    return f"evaluate.{asked}: needs held-out rows; set `data.holdout`" if asked else None


def best_has_rows(recipe: PartlyRead) -> str | None:
    is_asked = recipe.checkpoint and recipe.checkpoint.keep.best
    return "checkpoint.keep.best: needs held-out rows; set `data.holdout`" if is_asked and recipe.lacks_rows else None


def micro_batch_holds_a_row(recipe: PartlyRead) -> str | None:
    if recipe.train is None or recipe.task is None:
        return None
    budget, longest = recipe.train.micro_batch_tokens, recipe.task.max_length
    if isinstance(budget, int) and budget < longest:
        return f"train.micro_batch_tokens: {budget} is smaller than task.max_length {longest}"
    return None


def form_has_its_adapter(recipe: PartlyRead) -> str | None:
    is_asked = recipe.package and recipe.package.form == "adapter"
    return f"package.form: `adapter` needs {PEFT}" if is_asked and recipe.trains_the_base else None


def scaled_positions_stay_with_the_weights(recipe: PartlyRead) -> str | None:
    """An adapter's package names its base, whose config knows nothing of the scaling."""
    is_asked = recipe.package and recipe.package.form == "adapter" and recipe.base and recipe.base.rope
    return "package.form: an `adapter` cannot carry `base.rope`; use `merged`" if is_asked else None


def quantized_base_has_an_adapter(recipe: PartlyRead) -> str | None:
    kind = recipe.base and recipe.base.quantization
    if kind and kind != "dequantized" and recipe.trains_the_base:
        return f"base.quantization: `{kind}` weights cannot be trained; it needs {PEFT}"
    return None


def random_weights_are_trained(recipe: PartlyRead) -> str | None:
    if recipe.base is None or recipe.base.random_weights is None:
        return None
    if recipe.base.origin:
        return "base.origin: no Hub checkpoint is equal to `base.random_weights`"
    is_beside = not isinstance(recipe.adapter, Unread) and not recipe.trains_the_base
    return "base.random_weights: an adapter on random weights learns nothing; remove `adapter`" if is_beside else None


def bf16_weights_have_bf16_products(recipe: PartlyRead) -> str | None:
    is_mixed = recipe.train and recipe.train.weights == "bf16" and recipe.train.precision == "fp32"
    return "train.weights: `bf16` needs `train.precision: bf16`" if is_mixed else None


def bf16_weights_keep_small_updates(recipe: PartlyRead) -> str | None:
    """Only there are updates rounded by chance; rounded to nearest, most of a small learning rate's would be lost."""
    if recipe.train is None or recipe.optimizer is None or recipe.train.weights != "bf16":
        return None
    name = recipe.optimizer.name
    if recipe.trains_the_base and not recipe.optimizer.facts.keeps_small_updates:
        fit = " or ".join(
            f"`optimizer.name: {each}`" for each, facts in OPTIMIZERS.items() if facts.keeps_small_updates
        )
        return f"train.weights: `bf16` loses small updates with `{name}`; it needs {fit} or an adapter"
    return None


def offloaded_inputs_are_checkpointed(recipe: PartlyRead) -> str | None:
    is_alone = recipe.train and recipe.train.activation_offload and not recipe.train.activation_checkpointing
    return "train.activation_offload: needs `train.activation_checkpointing: true`" if is_alone else None


def what_is_compiled_has_no_other_form(recipe: PartlyRead) -> str | None:
    if not recipe.train or not recipe.train.compile:
        return None
    if recipe.train.kernels == "fused":
        return "train.kernels: `fused` does not go with `train.compile`, which fuses the same parts"
    return "train.mlp_chunk_tokens: does not go with `train.compile`" if recipe.train.mlp_chunk_tokens else None


def compiled_rows_are_packed(recipe: PartlyRead) -> str | None:
    if recipe.train is None or recipe.task is None or not recipe.train.has_fixed_lengths or recipe.task.packing:
        return None
    return "train.compile: without packing, lengths are not fixed; it needs `train.reproducibility: fast`"


def what_is_sharded_has_rows(recipe: PartlyRead) -> str | None:
    is_asked = recipe.train and recipe.train.strategy in SHARDED
    return f"train.strategy: {why}" if is_asked and (why := unshardable(recipe)) else None


def unshardable(recipe: Sharded) -> str | None:
    """Why what a recipe trains cannot be spread over devices by rows."""
    if recipe.optimizer and not recipe.optimizer.facts.is_by_row:
        return f"`fsdp` cannot spread the blocks of `{recipe.optimizer.name}`; it needs `adamw` or `sgd`"
    kind = recipe.base and recipe.base.quantization
    if kind and kind != "dequantized":
        return f"`fsdp` cannot spread `{kind}` weights; use `ddp`"
    if recipe.train and recipe.train.reproducibility == "elastic":
        return "`fsdp` adds gradients by rank, and `train.reproducibility: elastic` by slot; use `ddp`"
    return "`fsdp` does not go with `train.compile`" if recipe.train and recipe.train.compile else None


def routers_are_seen(recipe: PartlyRead) -> str | None:
    is_hidden = recipe.train and recipe.train.compile and recipe.train.router_loss != "off"
    return (
        "train.router_loss: compiled layers hide their routers; it needs `train.compile: false`" if is_hidden else None
    )


def elastic_sums_are_of_gradients(recipe: PartlyRead) -> str | None:
    is_asked = recipe.train and recipe.train.reproducibility == "elastic" and recipe.train.router_loss != "off"
    why = "ranks add up the figures of routers by rank; it needs `train.router_loss: off`"
    return f"train.reproducibility: {why}" if is_asked else None


def a_tracker_is_named_once(recipe: PartlyRead) -> str | None:
    names = [tracker.name for tracker in recipe.track or ()]
    repeated = next((name for name in names if names.count(name) > 1), None)
    return f"track: has `{repeated}` twice; give it once" if repeated else None


RULES = (
    sources_can_be_mixed,
    train_has_a_length,
    optimizer_has_its_settings,
    the_floor_is_below_the_peak,
    evaluation_has_rows,
    best_has_rows,
    micro_batch_holds_a_row,
    form_has_its_adapter,
    scaled_positions_stay_with_the_weights,
    quantized_base_has_an_adapter,
    random_weights_are_trained,
    bf16_weights_have_bf16_products,
    bf16_weights_keep_small_updates,
    offloaded_inputs_are_checkpointed,
    what_is_compiled_has_no_other_form,
    compiled_rows_are_packed,
    what_is_sharded_has_rows,
    routers_are_seen,
    elastic_sums_are_of_gradients,
    a_tracker_is_named_once,
)
