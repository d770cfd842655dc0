"""The weights of a model by kind of module, as `plan` lists them: how many there are, what becomes of them, and their bytes."""

from typing import TypedDict

from finetune.plan.activations import is_beside, stored_width, width
from finetune.plan.disk import readable
from finetune.plan.memory import QUANTIZED
from finetune.plan.plan import Plan
from finetune.plan.shape import Shape

BESIDE_TEXT, EMBEDDINGS, HEAD, SINKS = "beside text", "embeddings", "head", "sinks"
HEADING = ("kind", "parameters", "trained", "under adapters", "quantized", "bytes")


class OfKind(TypedDict):
    """Numbers of the base's parameters, tied ones once."""

    parameters: int
    trained: int
    under_adapter: int
    """Frozen, with an adapter's matrices beside them."""
    summed: int
    """Of those under adapters, the ones to which the matrices are added before the product."""
    linear: int
    """The weights of linear layers of the text side, without its head: what `base.quantization` quantizes."""


class KindFacts(TypedDict):
    """A row of the list."""

    parameters: int
    trained: int
    under_adapter: int
    quantized: int
    bytes: int
    """In the memory of the training, without gradients and moments."""


def facts_of(plan: Plan, kinds: dict[str, OfKind]) -> dict[str, KindFacts]:
    """The list of a plan, the largest kind first."""
    quantization = plan.quantization
    return {
        kind: {
            "parameters": one["parameters"],
            "trained": one["trained"],
            "under_adapter": one["under_adapter"],
            "quantized": one["linear"] if quantization else 0,
            "bytes": _bytes(plan, kind, one),
        }
        for kind, one in sorted(kinds.items(), key=lambda item: -item[1]["parameters"])
    }


def shaped(shape: Shape, kinds: dict[str, OfKind]) -> Shape:
    """A shape from a config, with what only the modules tell."""
    others = [one for kind, one in kinds.items() if kind not in (BESIDE_TEXT, EMBEDDINGS, HEAD)]
    not_linear = sum(one["parameters"] - one["linear"] for one in others)
    sinks = kinds[SINKS]["parameters"] // shape.layers if SINKS in kinds else 0  # one a head
    return shape._replace(
        not_linear=not_linear, summed=sum(one["summed"] for one in others), scored=max(shape.scored, sinks)
    )


def _bytes(plan: Plan, kind: str, one: OfKind) -> int:
    """Under an adapter linear layers are stored in the type of products; the head too, unless it is tied."""
    if not is_beside(plan):
        return stored_width(plan) * one["parameters"]
    products = one["parameters"] if kind == HEAD else one["linear"]
    each = QUANTIZED.get(plan.quantization or "", width(plan)) if kind != HEAD else width(plan)
    return round(each * products) + stored_width(plan) * (one["parameters"] - products)


def lines(kinds: dict[str, KindFacts], has_adapter: bool) -> list[str]:
    """The list for a reader."""
    rows = [HEADING] + [
        (
            kind,
            f"{one['parameters']:,}",
            f"{one['trained']:,}",
            f"{one['under_adapter']:,}",
            f"{one['quantized']:,}",
            readable(one["bytes"]),
        )
        for kind, one in kinds.items()
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    shown = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    total, held = (sum(one[name] for one in kinds.values()) for name in ("parameters", "under_adapter"))
    held += sum(one["trained"] for one in kinds.values())
    reached = [f"adapter: reaches {held / total:.0%} of the base's weights"] if has_adapter else []
    return [*reached, *(f"{'weights' if number == 0 else '':11}{line}" for number, line in enumerate(shown))]
