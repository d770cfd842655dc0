"""How several devices share the work of a plan, and the memory of one that does: formulas, as in `memory`."""

from finetune.errors import FinetuneError
from finetune.plan import memory
from finetune.plan.activations import average_bytes, width
from finetune.plan.memory import CPU_TOKENS, SLACK, Device, Work, fits
from finetune.plan.plan import Plan
from finetune.plan.shape import Shape
from finetune.recipe.schema.rules import SHARDED, unshardable


def strategy(plan: Plan, shape: Shape, device: Device) -> str:
    """`train.strategy`. `auto` is `fsdp` where several devices train what does not fit one, and can share it. FinetuneError where the
    launcher asks for what the recipe cannot do."""
    named = plan.recipe.train.strategy
    if device.world_size == 1:
        return "ddp"
    is_asked, why = named == "auto" and bool(device.asked), _unshardable(plan)
    if named == "auto" and not is_asked:
        work = Work(max(1, plan.counts.longest), plan.recipe.train.batch_size * plan.counts.longest)
        return "ddp" if why or fits(whole_bytes(plan, shape, work, device), device) else "fsdp"
    name = device.asked if is_asked else named
    if name in SHARDED and why:
        where, message = (
            ("environment", f"Accelerate is set to use FSDP: {why}") if is_asked else ("train.strategy", why)
        )
        raise FinetuneError(
            message, where=where, hint="change the launcher's flags or its configuration file, or the recipe"
        )
    return name


def _unshardable(plan: Plan) -> str | None:
    """Why the weights of a plan cannot be spread over devices by rows."""
    if why := unshardable(plan.recipe):
        return why
    kept = "`fsdp` cannot spread weights that stay as they are stored; use `ddp`, or `base.quantization: dequantized`"
    return kept if plan.base.stored else None


def sharing(name: str, device: Device) -> Device | None:
    """The device as one of those that share rows in a strategy; None where each holds the whole model."""
    if name not in SHARDED:
        return None
    return device._replace(world_size=device.processes) if name == "hsdp" else device


def parts(plan: Plan, shape: Shape, work: Work, device: Device) -> dict[str, int]:
    """Bytes at the peak of one process, by what holds them, in the strategy that the plan takes here. Its start needs less: it reads its
    own rows of the base."""
    shares = sharing(strategy(plan, shape, device), device)
    return sharded_parts(plan, shape, work, shares) if shares else memory.parts(plan, shape, work, device)


def sharded_parts(plan: Plan, shape: Shape, work: Work, device: Device) -> dict[str, int]:
    """At the peak where `device.world_size` devices share weights, gradients and moments."""
    found, world_size = memory.step_parts(plan, shape, work, device._replace(world_size=1)), device.world_size
    if world_size == 1:
        return found
    embeddings = shape.vocabulary * shape.hidden * (1 if shape.is_tied else 2)
    layer = (plan.total_parameters - plan.parameters_beside_text - embeddings) // shape.layers
    gathered = width(plan) * (2 * layer + embeddings)  # the current layer, the next one, and the parts around them
    shared = {
        "weights": found["weights"],
        "moments": found["moments"],
        "average": average_bytes(plan),
        "gradients": memory.trained_bytes(plan),
        "staging": 0 if device.is_gpu else found["staging"],
    }
    passing = {"gathered": gathered, "activations": found["activations"], "logits": found["logits"]}
    return {
        "process": found["process"],
        **{name: -(-size // world_size) for name, size in shared.items() if size},
        **passing,
        "slack": round(SLACK * sum(passing.values())),
    }


def sharded_bytes(plan: Plan, shape: Shape, work: Work, device: Device) -> int:
    return sum(sharded_parts(plan, shape, work, device).values())


def whole_bytes(plan: Plan, shape: Shape, work: Work, device: Device) -> int:
    """The peak where each device holds the whole model (`strategy: ddp`)."""
    return sum(memory.parts(plan, shape, work, device).values())


def micro_batch_tokens(plan: Plan, shape: Shape, device: Device) -> int:
    """The value of `auto`: the longest example, doubled while the forecast fits and a step or, on a CPU, the caches gain from it."""
    tokens = max(1, plan.counts.longest, plan.holdout_counts.longest)
    step = plan.recipe.train.batch_size * plan.counts.longest
    shares = sharing(strategy(plan, shape, device), device)
    while tokens < step and (device.is_gpu or 2 * tokens <= CPU_TOKENS):
        work = Work(2 * tokens, step)
        size = sharded_bytes(plan, shape, work, shares) if shares else whole_bytes(plan, shape, work, device)
        if not fits(size, device):
            break
        tokens *= 2
    return tokens
