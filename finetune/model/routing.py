"""Routers: which experts the tokens of a step go to, and the loss that balances them, as the base's own class defines it.

It must not change what a model computes. Shapes: T tokens, E experts, L layers with a router.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from finetune.errors import BaseError
from finetune.model.decoder_layers import module_of
from finetune.model.losses import unwrapped

NO_LOSS_HINT = "remove train.router_loss"


class Work(NamedTuple):
    """The micro-batch of a forward: what routers count, and how much its balance weighs."""

    lengths: list[int]
    """Tokens of each row. Padding beyond them does not count."""
    share: float
    """Its tokens, as a share of the step's."""
    scale: float
    """Of the loss that it is added to: a balance of 1 is worth as many nats."""
    is_counted: bool = True


class Found(NamedTuple):
    module: torch.nn.Module
    place: int
    """Which of its outputs are the logits (T, E)."""


class Routers:
    """The routers of a model, watched while `watching`."""

    def __init__(self, model: PreTrainedModel, setting: str | float = "off"):
        """`setting` is `train.router_loss`. BaseError if the family has no such loss."""
        found = routers_of(model)
        self.layers = [module_of(f"{name}.weight") for name in found]
        self.coefficient = coefficient_of(model, setting)
        self.experts, self.top_k = sizes_of(model)
        self._balance = _balance_of(model)
        self._is_watching = False
        self._logits: list[Tensor] = []
        self._chosen: list[tuple[int, Tensor]] = []
        device = next(model.parameters()).device
        self._counts = torch.zeros(len(found), self.experts, dtype=torch.float64, device=device)
        self._balance_sum = torch.zeros(1, dtype=torch.float64, device=device)
        for number, each in enumerate(found.values()):
            each.module.register_forward_hook(self._hook(number, each.place))

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Around a forward. Activation checkpointing runs routers again later, which does not count."""
        self._logits, self._chosen, self._is_watching = [], [], True
        try:
            yield
        finally:
            self._is_watching = False

    def added(self, work: Work) -> Tensor | None:
        """Counts the forward that was watched last. Returns what it adds to the loss; None without a coefficient."""
        logits, chosen, self._logits, self._chosen = self._logits, self._chosen, [], []
        if not logits:  # a family may skip its routers for some rows
            return None
        mask_T = self._mask(work.lengths, len(logits[0]))
        for number, each in chosen:
            if work.is_counted:
                self._counts[number] += self._counted(each, mask_T)
        if not self.coefficient or self._balance is None:
            return None
        balance = self._balance(tuple(logits), self.experts, self.top_k, mask_T)
        if work.is_counted:
            self._balance_sum += work.share * balance.detach().double()
        return self.coefficient * work.share * work.scale * balance

    def take(self) -> Tensor:
        """The figures of a step, fp64 on its device, for `load` and `balance_of`; the next step begins at 0."""
        figures = torch.cat([self._counts.flatten(), self._balance_sum])
        self._counts.zero_()
        self._balance_sum.zero_()
        return figures

    def balance_of(self, figures: list[float]) -> float | None:
        """The mean over a step's tokens of the balance of their micro-batch, without the coefficient; None where it has none."""
        return figures[-1] if self.coefficient else None

    def load(self, figures: list[float]) -> dict[str, list[int]]:
        """Tokens of a step that went to each expert, by layer."""
        size = self.experts
        return {
            layer: [int(count) for count in figures[place * size : (place + 1) * size]]
            for place, layer in enumerate(self.layers)
        }

    def _hook(self, number: int, place: int) -> Callable[[Any, Any, Any], None]:
        def hook(module: object, inputs: object, output: tuple[Tensor, ...]) -> None:
            if not self._is_watching:
                return
            logits = output[place].flatten(0, -2)
            self._logits.append(logits)
            with torch.no_grad():
                chosen = next((each for each in output if self._are_experts(each, len(logits))), None)
                # A router that returns only scores has kept those of the highest logits.
                chosen = logits.topk(self.top_k, dim=-1).indices if chosen is None else chosen
                self._chosen.append((number, chosen.reshape(len(logits), -1)))

        return hook

    def _are_experts(self, output: object, tokens: int) -> bool:
        """Whether an output of a router holds the experts of each token. JetMoE's have others: an order of tokens, a list, None."""
        is_of_ids = isinstance(output, Tensor) and not output.is_floating_point() and output.ndim > 1
        return is_of_ids and output.shape[-1] == self.top_k and output.numel() == tokens * self.top_k  # type: ignore[attr-defined]

    def _mask(self, lengths: list[int], tokens: int) -> Tensor | None:
        """1 for tokens of rows, 0 for padding, (T,); None where there is no padding."""
        if sum(lengths) == tokens:
            return None
        width = tokens // len(lengths)
        real = torch.arange(width)[None] < torch.tensor(lengths)[:, None]
        return real.flatten().to(self._counts.device, torch.float32)

    def _counted(self, chosen: Tensor, mask_T: Tensor | None) -> Tensor:
        if mask_T is not None:
            # Beyond the range of experts, which a histogram leaves out.
            chosen = chosen.masked_fill(mask_T[:, None] == 0, -1)
        # As in transformers: integers are deterministic on a GPU, and a CPU's histogram takes floats.
        kind = torch.float32 if chosen.device.type == "cpu" else torch.int32
        flat = chosen.flatten().to(kind)
        return torch.histc(flat, bins=self.experts, min=0, max=self.experts).double()


def routers_of(model: PreTrainedModel) -> dict[str, Found]:
    """The modules whose outputs transformers calls `router_logits`, by name."""
    kinds: list[Any] = []
    for module in model.modules():
        named = getattr(module, "_can_record_outputs", None) or {}
        recorders = named.get("router_logits", [])
        kinds += recorders if isinstance(recorders, list) else [recorders]
    kinds = [kind for kind in kinds if isinstance(getattr(kind, "target_class", None), type)]
    found = {}
    for name, module in model.named_modules():
        if kind := next((each for each in kinds if isinstance(module, each.target_class)), None):
            found[name] = Found(module, kind.index)
    return found


def watched(model: PreTrainedModel, setting: str | float, is_compiled: bool) -> Routers | None:
    """Routers to watch; None for a base without, and under compilation, which hooks would break up."""
    if setting != "off":
        coefficient_of(model, setting)
    return Routers(model, setting) if routers_of(model) and all(sizes_of(model)) and not is_compiled else None


def coefficient_of(model: PreTrainedModel, setting: str | float) -> float:
    """The number by which the balance is multiplied: 0 for `off`. BaseError where the base has none, or no such loss."""
    if setting == "off":
        return 0.0
    inner = unwrapped(model)
    if not routers_of(model) or not all(sizes_of(model)) or _balance_of(model) is None:
        message = f"{type(inner).__name__} has no load-balancing loss"
        raise BaseError(message, where="train.router_loss", hint=NO_LOSS_HINT)
    stated: float | None = getattr(inner.config.get_text_config(), "router_aux_loss_coef", None)
    if setting != "base":
        return float(setting)
    if stated is None:
        message = "the base's config has no router_aux_loss_coef"
        raise BaseError(message, where="train.router_loss", hint="give a number, like 0.001")
    return stated


def sizes_of(model: PreTrainedModel) -> tuple[int, int]:
    """Experts, and experts of a token; 0 where its class or config does not say."""
    inner, config = unwrapped(model), unwrapped(model).config.get_text_config()
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    experts = getattr(inner, "num_experts", None) or next(filter(None, (getattr(config, each, 0) for each in names)), 0)
    top_k = getattr(inner, "num_experts_per_tok", None) or getattr(config, "num_experts_per_tok", 0)
    return (experts, top_k) if isinstance(experts, int) and isinstance(top_k, int) else (0, 0)


def _balance_of(model: PreTrainedModel) -> Callable[..., Tensor] | None:
    """The family's own function of logits, experts, experts of a token, and mask; None if it has none."""
    module = sys.modules[type(unwrapped(model)).__module__]
    return getattr(module, "load_balancing_loss_func", None)
