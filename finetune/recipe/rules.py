"""What sections of a recipe cannot do together; `schema` asks when all are right, `check` as far as they are.

A rule is a function of the sections that it names; it returns what does not fit as `key: message`, or None.
"""

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from finetune.recipe.schema import (
        Base,
        ChatTask,
        Checkpoint,
        Data,
        Evaluate,
        FrozenAdapter,
        LoraAdapter,
        Optimizer,
        Package,
        TextTask,
        Train,
    )


def problems(sections: Mapping[str, object]) -> list[str]:
    """What does not fit together, as `key: message`; a rule is asked only when every section that it names is there."""
    found: list[str] = []
    for rule in RULES:
        names = inspect.signature(rule).parameters
        if names.keys() <= sections.keys() and (problem := rule(**{name: sections[name] for name in names})):
            found.append(problem)
    return found


def all_weights_or_none(data: "Data") -> str | None:
    has_weight = [source.weight is not None for source in data.train]
    if any(has_weight) and not all(has_weight):
        return "data.train: some sources have a `weight` and some do not; give all of them one, or none"
    return None


def train_has_a_length(train: "Train") -> str | None:
    return "train: needs `epochs` or `steps`" if train.epochs is None and train.steps is None else None


def optimizer_has_its_settings(optimizer: "Optimizer") -> str | None:
    fields = type(optimizer).model_fields
    foreign = ("betas", "eps") if optimizer.name == "sgd" else ("momentum",)
    set_in_vain = [name for name in foreign if getattr(optimizer, name) != fields[name].default]
    return f"optimizer.{set_in_vain[0]}: has no meaning for `{optimizer.name}`" if set_in_vain else None


def evaluation_has_rows(evaluate: "Evaluate", data: "Data") -> str | None:
    return (
        "evaluate.every: needs held-out rows; set `data.holdout`" if evaluate.every and not has_holdout(data) else None
    )


def best_has_rows(checkpoint: "Checkpoint", data: "Data") -> str | None:
    return (
        "checkpoint.keep.best: needs held-out rows; set `data.holdout`"
        if checkpoint.keep.best and not has_holdout(data)
        else None
    )


def micro_batch_holds_a_row(train: "Train", task: "ChatTask | TextTask") -> str | None:
    budget = train.micro_batch_tokens
    if isinstance(budget, int) and budget < task.max_length:
        return f"train.micro_batch_tokens: {budget} is smaller than task.max_length {task.max_length}"
    return None


def form_has_its_adapter(package: "Package", adapter: "LoraAdapter | FrozenAdapter | None") -> str | None:
    return (
        "package.form: `adapter` needs `adapter: {name: lora}`"
        if package.form == "adapter" and not _is_lora(adapter)
        else None
    )


def quantized_base_has_an_adapter(base: "Base", adapter: "LoraAdapter | FrozenAdapter | None") -> str | None:
    if base.quantization and not _is_lora(adapter):
        return f"base.quantization: `{base.quantization}` weights cannot be trained; it needs `adapter: {{name: lora}}`"
    return None


def bf16_weights_have_bf16_products(train: "Train") -> str | None:
    is_mixed = train.weights == "bf16" and train.precision == "fp32"
    return "train.weights: `bf16` needs `train.precision: bf16`" if is_mixed else None


def bf16_weights_keep_small_updates(
    train: "Train", optimizer: "Optimizer", adapter: "LoraAdapter | FrozenAdapter | None"
) -> str | None:
    """Only there are updates rounded by chance; rounded to nearest, most of a small learning rate's would be lost."""
    if train.weights == "bf16" and not _is_lora(adapter) and optimizer.name != "adamw":
        return f"train.weights: `bf16` loses small updates with `{optimizer.name}`; it needs `optimizer.name: adamw` or an adapter"
    return None


def compiled_kernels_are_not_exact(train: "Train") -> str | None:
    if train.compile and train.reproducibility == "exact":
        return "train.compile: kernels depend on which lengths came first; it needs `train.reproducibility: fast`"
    return None


def has_holdout(data: "Data") -> bool:
    return bool(data.holdout) and not (isinstance(data.holdout, str) and float(data.holdout[:-1]) == 0)


def _is_lora(adapter: "LoraAdapter | FrozenAdapter | None") -> bool:
    return adapter is not None and adapter.name == "lora"


RULES = (
    all_weights_or_none,
    train_has_a_length,
    optimizer_has_its_settings,
    evaluation_has_rows,
    best_has_rows,
    micro_batch_holds_a_row,
    form_has_its_adapter,
    quantized_base_has_an_adapter,
    bf16_weights_have_bf16_products,
    bf16_weights_keep_small_updates,
    compiled_kernels_are_not_exact,
)
