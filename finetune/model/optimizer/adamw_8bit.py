"""AdamW with moments of 8 bits, in blocks with a scale each (Dettmers et al. 2021, arXiv 2110.02861).

The update is bitsandbytes' kernel; the state is our own, tensors alone, so that checkpoints store and restore it like any other.
"""

from types import ModuleType

import torch
from torch.optim.adamw import adamw

from finetune.errors import FinetuneError
from finetune.model.optimizer.member import Group, Member, Trained
from finetune.recipe.schema import Optimizer

BLOCK = 256  # values that share a scale, fixed in the kernel
SMALLEST = 4096  # of fewer values the moments stay in fp32: biases, norms and small matrices; as in bitsandbytes


class AdamW8bit(torch.optim.Optimizer):
    """Moments of embeddings stay in fp32 too: their gradients are uneven, which the paper found unstable in 8 bits."""

    def __init__(
        self,
        groups: list[Group],
        embeddings: frozenset[torch.nn.Parameter],
        *,
        betas: tuple[float, float],
        eps: float,
        is_paged: bool = False,
    ):
        super().__init__(groups, {"lr": 0.0, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self._kernels = kernels()
        if is_paged and not torch.cuda.is_available():
            hint = "use `adamw_8bit`"
            raise FinetuneError("`paged_adamw_8bit` needs a GPU to page from", where="optimizer.name", hint=hint)
        self._embeddings = embeddings
        self._is_paged = is_paged
        self._codes: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override] # a closure is no way to train here
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in parameters:
                self._prepare(parameter)
            whole = [parameter for parameter in parameters if not self._is_coded(parameter)]
            if whole:
                self._update_whole(whole, group)
            for parameter in parameters:
                if self._is_coded(parameter):
                    self._update_coded(parameter, group)
        if self._is_paged:
            torch.cuda.synchronize()  # what the GPU pages is read by the host when a snapshot is taken

    def _is_coded(self, parameter: torch.Tensor) -> bool:
        return parameter.numel() >= SMALLEST and parameter not in self._embeddings

    def _prepare(self, parameter: torch.Tensor) -> None:
        """Makes the first state; moves a restored one to the place the kernels need."""
        slots = self.state[parameter]
        if not slots:
            slots["step"] = torch.zeros(())
            coded = self._is_coded(parameter)
            for name in ("exp_avg", "exp_avg_sq"):
                slots[name] = torch.zeros_like(parameter, dtype=torch.uint8 if coded else torch.float32)
                if coded:
                    blocks = -(-parameter.numel() // BLOCK)
                    slots[f"{name}_scale"] = torch.zeros(blocks, dtype=torch.float32, device=parameter.device)
        slots["step"] = slots["step"].cpu()  # the kernels want a number, and reading a device would wait for it
        for name in ("exp_avg", "exp_avg_sq"):
            found = slots[name]
            if self._is_paged and self._is_coded(parameter) and not getattr(found, "is_paged", False):
                paged = self._kernels.get_paged(*parameter.shape, dtype=found.dtype, device=parameter.device)
                slots[name] = paged
                paged.copy_(found)

    def _update_whole(self, parameters: list[torch.Tensor], group: Group) -> None:
        slots = [self.state[parameter] for parameter in parameters]
        adamw(
            parameters,
            [parameter.grad for parameter in parameters if parameter.grad is not None],
            [slot["exp_avg"] for slot in slots],
            [slot["exp_avg_sq"] for slot in slots],
            [],
            [slot["step"] for slot in slots],
            amsgrad=False,
            maximize=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
        )

    def _update_coded(self, parameter: torch.Tensor, group: Group) -> None:
        slots = self.state[parameter]
        slots["step"] += 1
        signed, unsigned = self._codes_on(parameter.device)
        self._kernels.optimizer_update_8bit_blockwise(
            "adam",  # the kernel of this name decouples weight decay
            parameter.grad,
            parameter,
            slots["exp_avg"],
            slots["exp_avg_sq"],
            *group["betas"],
            0.0,
            0.0,
            group["eps"],
            int(slots["step"]),
            group["lr"],
            signed,
            unsigned,
            slots["exp_avg_scale"],
            slots["exp_avg_sq_scale"],
            group["weight_decay"],
        )

    def _codes_on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """The numbers of the 256 codes: with a sign for the first moment, without for the second."""
        if device not in self._codes:
            codes = (self._kernels.create_dynamic_map(signed=signed).to(device) for signed in (True, False))
            self._codes[device] = tuple(codes)
        return self._codes[device]


def kernels() -> ModuleType:
    """The functions of bitsandbytes; FinetuneError if it is not installed."""
    try:
        from bitsandbytes import functional
    except ImportError:
        raise FinetuneError(
            "8-bit optimizers need bitsandbytes", where="optimizer.name", hint="pip install bitsandbytes"
        ) from None
    return functional


def build(trained: Trained, settings: Optimizer) -> torch.optim.Optimizer:
    return AdamW8bit(trained.groups, trained.embeddings, betas=settings.betas, eps=settings.eps)


MEMBER = Member(build, kernels)
