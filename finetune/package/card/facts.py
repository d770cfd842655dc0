"""What a card is made from, and how it and the attestations name the base and the method."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NotRequired, TypedDict

from finetune.package.card import record
from finetune.package.card.metadata import FrontMatter
from finetune.package.card.reported import Reported
from finetune.plan.plan import Plan, Stage
from finetune.plan.split import Seen
from finetune.store.checkpoints.manifest import Manifest
from finetune.store.checkpoints.refs import parse
from finetune.store.run.records import Record


class CheckReport(TypedDict):
    """Something that was found to hold of a package, with the figures that show it."""

    name: str
    message: str
    max_difference: NotRequired[float]
    mean_kl: NotRequired[float]
    top1_agreement: NotRequired[float]
    bound: NotRequired[float]
    tensors: NotRequired[int]
    tokens: NotRequired[int]
    vocabulary: NotRequired[int]
    positions: NotRequired[int]


@dataclass(frozen=True)
class Facts:
    """The input of a card."""

    plan: Plan
    manifest: Manifest
    figures: Sequence[Record]
    """The figures-only journal up to the step."""
    checks: Sequence[CheckReport]
    form: str
    """`merged` or `adapter`."""
    dtype: str
    licence: FrontMatter | None
    """Licence keys of the card; None if the base's licence is unknown and the recipe names none."""
    base_licence: str | None
    """The base's own statement."""
    data_licences: Sequence[str | None]
    """The licence of each source of training rows, if its card states one."""
    averaged: Sequence[Manifest] = ()
    """The other checkpoints in the weights."""
    stages: Sequence[Stage] = ()
    """The run and those before it, in the form that `lineage` reads from the package."""
    seen: Sequence[Seen] = ()
    """Rows of the figures that this or an earlier run trained on, or may have."""
    report: Reported | None = None
    """The figures on the test set, if the recipe names one."""

    @property
    def rows(self) -> int:
        """The number of rows that the figures are of."""
        return int(self.report.own["rows"]) if self.report else self.plan.holdout_counts.rows


def hub_base(plan: Plan) -> tuple[str, str | None] | None:
    """The Hub checkpoint under a run and its commit, if known; None for random weights and a base without a public name."""
    origin = plan.recipe.base.origin
    is_of_hub = plan.base.kind == "hub" or (plan.base.kind == "gguf" and plan.base.revision and not origin)
    if is_of_hub and (ref := parse(plan.recipe.base.checkpoint)).kind == "hub":
        return ref.repo, plan.base.revision
    return (origin, None) if origin else None


def lies_on(plan: Plan) -> str | None:
    """The weights under a package where they are not those in the base's files; None where they are."""
    if plan.base.dequantized is None:
        return None
    hub = hub_base(plan)
    name = hub[0] if hub else record.public_name(plan.recipe.base.checkpoint)
    version = f"at commit {hub[1]}" if hub and hub[1] else f"with the digest {plan.base.digest}"
    if plan.base.stored and plan.recipe.package.form == "adapter":
        return f"the weights of {name} {version} as its files store them ({plan.base.dequantized})"
    return f"the dequantized weights ({plan.base.dequantized}) of {name} {version}"


def method(plan: Plan) -> str:
    if plan.recipe.base.random_weights is not None:
        return "pretraining"
    return plan.recipe.adapter.title if plan.recipe.adapter else "full fine-tuning"
