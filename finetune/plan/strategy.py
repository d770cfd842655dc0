"""How several devices share the work of a plan, and the memory of one that does: formulas, as in `memory`."""

from finetune.errors import FinetuneError
from finetune.plan import gathered, memory
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
    is_asked, why = named == "auto" and bool(device.asked), unshardable_plan(plan)
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


def unshardable_plan(plan: Plan) -> str | None:
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
    """At the peak where `device.world_size` devices share weights, gradients and moments: in a step, at the end of its backward pass, or
    in an evaluation."""
    if device.world_size == 1:
        return memory.parts(plan, shape, work, device)
    alone = device._replace(world_size=1)
    evaluation = memory.evaluation_parts(plan, shape, work, alone)
    shared = {
        "weights": evaluation["weights"],
        "moments": evaluation["moments"],
        "average": evaluation.get("average", 0),
        "gradients": memory.trained_bytes(plan),
        "staging": evaluation.get("staging", 0),
    }
    lasting = {"process": memory.process_bytes(device)}
    lasting |= {name: -(-size // device.world_size) for name, size in shared.items() if size}
    moments = (
        {
            "gathered": gathered.in_a_step(plan, shape),
            **memory.passing_parts(plan, shape, memory.tokens_of(plan, work), device.is_gpu, is_spread=True),
        },
        {"gathered": gathered.at_the_end(plan, shape)},
        {
            "gathered": gathered.in_a_forward(plan, shape),
            **{name: evaluation[name] for name in ("activations", "logits")},
        },
    )
    passing = max(moments, key=lambda each: sum(each.values()))
    return lasting | passing | {"slack": round(SLACK * sum(passing.values()))}


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
