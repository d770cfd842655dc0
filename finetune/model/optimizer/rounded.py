"""AdamW over weights in bf16, with moments in fp32 and stochastic rounding of updates.

bf16 has 8 bits of precision: rounded to nearest, an update under 1/256 of its weight is lost, and most are. With stochastic rounding
the weight is right in expectation (Gupta et al. 2015, arXiv 1502.02551).
"""

import torch
from torch.optim.adamw import adamw

from finetune.model import shards
from finetune.model.optimizer.member import Group
from finetune.plan.memory import update_slice
from finetune.plan.row_order import derive


class Scratch:
    """Buffers for one slice, reused: in fresh memory an update takes several times as long."""

    def __init__(self, device: torch.device, size: int):
        self.weight, self.grad = (torch.empty(size, device=device) for _ in range(2))
        self.words = torch.empty(-(-size // 4), dtype=torch.int64, device=device)
        self.noise = torch.empty(size, dtype=torch.int32, device=device)


class RoundedAdamW(torch.optim.Optimizer):
    """Random numbers are a function of seed, update and parameter: the same on every rank, and after a resume.

    It updates parameters of other types without rounding.
    """

    def __init__(self, groups: list[Group], seed: int, *, betas: tuple[float, float], eps: float):
        super().__init__(groups, {"lr": 0.0, "betas": betas, "eps": eps, "weight_decay": 0.0, "fused": True})
        self.grad_scale: torch.Tensor | None = None
        """The update divides gradients by it."""
        self._seed = seed
        self._updates = 0
        self._counter: torch.Tensor | None = None
        """A counter of the state behind `_updates`. Another one means: a state was loaded."""
        self._scratch: dict[torch.device, Scratch] = {}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override] # a closure is no way to train here
        counters = [slots["step"] for slots in self.state.values()]
        if not counters or counters[0] is not self._counter:  # one read of the device, after a state was loaded
            self._updates = int(torch.stack(counters).max()) if counters else 0
        self._updates += 1
        number = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                number += 1
                if parameter.grad is not None:
                    # A rank that holds some rows has other random numbers for them than for those of another rank.
                    rows = shards.rows_of(parameter)
                    place = (self._updates, number, *([rows.first] if rows and rows.first else []))
                    self._update(parameter, parameter.grad, group, derive(self._seed, "rounding", *place))
        self._counter = next((slots["step"] for slots in self.state.values()), None)

    def _update(self, parameter: torch.Tensor, gradient: torch.Tensor, group: Group, seed: int) -> None:
        slots = self.state[parameter]
        if not slots:
            slots["step"] = torch.zeros((), device=parameter.device)
            for name in ("exp_avg", "exp_avg_sq"):
                slots[name] = torch.zeros_like(parameter, dtype=torch.float32, memory_format=torch.contiguous_format)
        generator = torch.Generator(parameter.device).manual_seed(seed)
        size, scratch = update_slice(parameter.device.type), self._scratch_on(parameter.device)
        tensors = (parameter.detach(), gradient, slots["exp_avg"], slots["exp_avg_sq"])
        flat = [shards.local(tensor).view(-1) for tensor in tensors]
        for weight, grad, first, second in zip(*(tensor.split(size) for tensor in flat), strict=True):
            updated = scratch.weight[: len(weight)].copy_(weight)
            adamw(
                [updated],
                [scratch.grad[: len(grad)].copy_(grad)],
                [first],
                [second],
                [],
                [slots["step"].clone()],  # it is counted up in place, once a slice
                fused=True,
                grad_scale=self.grad_scale,
                amsgrad=False,
                maximize=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
            )
            if weight.dtype == torch.bfloat16:
                round_by_chance(updated, generator, scratch)
            weight.copy_(updated)
        slots["step"] += 1

    def _scratch_on(self, device: torch.device) -> Scratch:
        if device not in self._scratch:
            largest = max(parameter.numel() for group in self.param_groups for parameter in group["params"])
            self._scratch[device] = Scratch(device, min(largest, update_slice(device.type)))
        return self._scratch[device]


def round_by_chance(values: torch.Tensor, generator: torch.Generator, scratch: Scratch) -> None:
    """Makes each fp32 value one of its two neighbours in bf16, the nearer one more likely.

    bf16 drops the lower 16 bits of an fp32 number. Adding a random number of 16 bits carries over with the right
    probability, whatever the sign.
    """
    words = scratch.words[: -(-len(values) // 4)]
    words.random_(-(2**63), None, generator=generator)  # four numbers in each
    noise = scratch.noise[: len(values)].copy_(words.view(torch.int16)[: len(values)]).bitwise_and_(0xFFFF)
    values.view(torch.int32).add_(noise).bitwise_and_(-0x10000)
