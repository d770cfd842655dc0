"""The resume contract: the keys and facts that may differ between a recipe and its run, and the reasons.

A plan's id covers the keys that bind a run, and docs/resume.md shows these tables.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple


class Rule(NamedTuple):
    keys: tuple[str, ...]
    """Dotted names; a section stands for all keys in it."""
    on_resume: str
    """`taken`: the recipe's value holds from now on. `extended`: a larger one extends the run. `refused`: the run keeps its own.
    `said`: a fact that is compared, and recorded again."""
    why: str

    def covers(self, key: str) -> bool:
        return any(key == name or key.startswith((f"{name}.", f"{name}[")) for name in self.keys)


# Every key of a recipe is covered by exactly one.
RECIPE = (
    Rule(("base",), "refused", "training begins with these weights, and every checkpoint names them"),
    Rule(("task",), "refused", "it decides which tokens a row becomes, how they are arranged, and which of them count"),
    Rule(("data",), "refused", "it decides the rows of every step, and which are held out"),
    Rule(("adapter",), "refused", "checkpoints hold these tensors and their moments"),
    Rule(("optimizer",), "refused", "it decides every update"),
    Rule(
        ("train.epochs", "train.steps"),
        "extended",
        "a run can be extended, in the key that gave its length, and never shortened",
    ),
    Rule(
        ("train.batch_size", "train.seed"), "refused", "with the step they decide its rows, initial weights and dropout"
    ),
    Rule(
        ("train.precision", "train.weights", "train.reproducibility"), "refused", "they decide how every sum is rounded"
    ),
    Rule(("train.router_loss",), "refused", "it is a part of the loss that is trained"),
    Rule(("train.ema",), "refused", "the average reaches back to the first step"),
    Rule(
        ("train.micro_batch_tokens",),
        "taken",
        "a step has to fit the memory that is there; its sums are taken in another order, so bit equality may be lost",
    ),
    Rule(("train.activation_checkpointing",), "taken", "what is not kept is computed again, to the same bits"),
    Rule(("train.activation_offload",), "taken", "what is kept elsewhere comes back with the same bits"),
    Rule(
        ("train.mlp_chunk_tokens",),
        "taken",
        "a long row has to fit the memory that is there; its sums are taken in another order, so bit equality may be lost",
    ),
    Rule(
        ("train.strategy",),
        "taken",
        "every step has the same rows; devices share its sums in another way, so bit equality may be lost",
    ),
    Rule(
        ("train.lost_rank_seconds",), "taken", "it decides when a training gives up on a process, and none of its steps"
    ),
    Rule(
        ("train.kernels",),
        "taken",
        "every step has the same rows; fused kernels round otherwise, so bit equality may be lost",
    ),
    Rule(("train.early_stopping",), "taken", "it decides when training ends, and none of its steps"),
    Rule(("train.compile",), "taken", "compiled kernels take sums in another order, so bit equality may be lost"),
    Rule(("evaluate",), "taken", "evaluation leaves no trace in training"),
    Rule(("checkpoint",), "taken", "a save leaves no trace in training"),
    Rule(("guard",), "taken", "it decides which updates are not made; what was decided before is recorded, and stays"),
    Rule(("track",), "taken", "a tracker only listens"),
    Rule(("mirror",), "taken", "a copy leaves no trace in training"),
    Rule(("package", "publish"), "taken", "they are about what is made of the run afterwards"),
)

# Facts of the machine that a run records and does not promise: where one differs, bit equality may be lost.
FACTS = (
    Rule(("versions",), "said", "another version may compute the same in another order"),
    Rule(("device",), "said", "another device rounds otherwise"),
    Rule(("world_size",), "said", "every step has the same rows, and more or fewer processes add them up"),
    Rule(("strategy",), "said", "devices that share a model take its sums in another order"),
    Rule(("hosts",), "said", "rows are spread within a host, and added up within it first"),
    Rule(("threads",), "said", "sums are divided among the threads"),
    Rule(("micro_batch_tokens",), "said", "every step has the same rows, in other groups"),
    Rule(("update_slice",), "said", "weights in bf16 are rounded by other random numbers"),
    Rule(("kernels",), "said", "fused kernels round otherwise than plain ones, and versions may differ"),
)
FACT_NAMES = tuple(name for rule in FACTS for name in rule.keys)
PLAIN, COMPILED = "plain", "compiled"
"""The fact `kernels` of a run without fused ones; the second of one with `train.compile` that promises equal bits."""
# What held where a run was recorded by code that did not write the fact down.
UNRECORDED = {"update_slice": 2**20, "strategy": "ddp", "kernels": PLAIN}


def recorded(facts: Mapping[str, object]) -> dict[str, object]:
    """The facts of a run that are compared, of whatever age its record is; None for an unknown one."""
    return {name: facts.get(name, UNRECORDED.get(name)) for name in FACT_NAMES}


def that_may_cost_bits(
    old: Mapping[str, object], new: Mapping[str, object], reproducibility: str
) -> Iterator[tuple[str, object, object]]:
    """The facts that differ between two machines, where sums may then be taken in another order: name, old value, new value."""
    promised = ("world_size",) if reproducibility == "elastic" else ()
    for name, before, now in differences(recorded(old), recorded(new)):
        if name not in promised:
            yield name, before, now


def rule_of(key: str) -> Rule:
    return next(rule for rule in RECIPE if rule.covers(key))


def outcome(key: str, old: object, new: object) -> str:
    """What happens to a difference between the recipe of a run and the one it is resumed with: `taken`, `extended` or `refused`."""
    rule = rule_of(key)
    is_longer = isinstance(old, int) and isinstance(new, int) and new > old
    return "refused" if rule.on_resume == "extended" and not is_longer else rule.on_resume


def binding(recipe: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """A dumped recipe without the keys that are taken on resume: what is left decides what is trained."""
    bound: dict[str, object] = {}
    for name, value in recipe.items():
        rule = next((rule for rule in RECIPE if rule.covers(f"{prefix}{name}")), None)
        if rule is None and isinstance(value, Mapping):  # a section that several rules share
            bound[name] = binding(value, f"{prefix}{name}.")
        elif rule and rule.on_resume != "taken":
            bound[name] = value
    return bound


def differences(old: object, new: object, key: str = "") -> Iterator[tuple[str, object, object]]:
    """Every key in which two records differ: dotted name, old value, new value."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            yield from differences(old.get(name), new.get(name), f"{key}.{name}" if key else name)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, pair in enumerate(zip(old, new, strict=True)):
            yield from differences(*pair, f"{key}[{index}]")
    elif old != new:
        yield key, old, new
