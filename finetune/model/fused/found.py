"""Which modules of a family a kernel can stand for, found on a small model of it: each is tried, and compared with a formula.

Nothing here knows a family, and no name of a layer: what computes the same is the same.
"""

import inspect
import types
from collections.abc import Callable, Iterator
from itertools import permutations
from typing import NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from finetune.errors import of_libraries
from finetune.model.fused import formulas
from finetune.model.fused.formulas import Activation, Casting, Gated, Norm

FoundT = TypeVar("FoundT")
OFFSETS, CASTINGS, ACTIVATIONS = (0.0, 1.0), ("gemma", "llama"), ("silu", "gelu_tanh")
TOLERANCE = 1e-5  # of the norm, in fp32


class Parts(NamedTuple):
    """By class name of a module."""

    norms: dict[str, Norm]
    gated: dict[str, Gated]
    rotary: dict[str, str]
    """The name in an attention's code of the function that turns queries and keys."""

    @property
    def told(self) -> str:
        """Empty where there is nothing to fuse."""
        names = (("norms", self.norms), ("rotary positions", self.rotary), ("feed-forward", self.gated))
        return ", ".join(name for name, found in names if found)


def parts_of(model: torch.nn.Module) -> Parts:
    """The parts of a small model, on the CPU in fp32 and eval mode. A class counts if all of its modules are alike."""
    modules = [module for module in model.modules() if not _is_bare(module)]
    return Parts(_alike(modules, _norm), _alike(modules, _gated), _alike(modules, _rotary))


def _alike(modules: list[torch.nn.Module], find: Callable[[torch.nn.Module], FoundT | None]) -> dict[str, FoundT]:
    seen: dict[str, set[FoundT | None]] = {}
    for module in modules:
        seen.setdefault(type(module).__name__, set()).add(find(module))
    return {name: one for name, (one, *others) in seen.items() if one is not None and not others}


def _is_bare(module: torch.nn.Module) -> bool:
    """Whether it has nothing that a kernel needs, like a norm without a weight: such modules of a class stay as they are."""
    return not any(True for _ in module.parameters())


def _norm(module: torch.nn.Module) -> Norm | None:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 1 or [*module.parameters()] != [weight] or [*module.buffers()]:
        return None
    # Small numbers, so that the small term has a part in it.
    hidden = _numbers(8, len(weight)) * torch.tensor([1e-3, 1.0]).repeat(4)[:, None]
    given = _of(module, hidden)
    names = [name for name, value in vars(module).items() if isinstance(value, float)]
    for eps, offset in ((eps, offset) for eps in names for offset in OFFSETS):
        found = Norm(offset, "gemma", eps)
        if given is not None and _are_same(given, formulas.norm(hidden, weight, found, getattr(module, eps))):
            return found._replace(casting=_casting(module, found, hidden.bfloat16()))
    return None


def _casting(module: torch.nn.Module, found: Norm, hidden: Tensor) -> Casting:
    """The one whose bits in bf16 are nearer to the module's."""
    weight, eps = cast(Tensor, module.weight).detach(), getattr(module, found.eps)
    kept = cast(Tensor, module.weight).data
    cast(torch.nn.Parameter, module.weight).data = kept.bfloat16()
    given = _of(module, hidden)
    cast(torch.nn.Parameter, module.weight).data = kept

    def distance(casting: str) -> float:
        mine = formulas.norm(hidden, weight.bfloat16(), found._replace(casting=cast(Casting, casting)), eps)
        return float("inf") if given is None else float((given.float() - mine.float()).norm())

    return cast(Casting, min(CASTINGS, key=distance))


def _gated(module: torch.nn.Module) -> Gated | None:
    layers = {name: child for name, child in module.named_children() if isinstance(child, torch.nn.Linear)}
    others = [child for name, child in module.named_children() if name not in layers and not _is_bare(child)]
    if others or len(layers) not in (2, 3) or any(True for _ in module.parameters(recurse=False)):
        return None
    hidden = _numbers(8, next(iter(layers.values())).in_features)[None]
    given = _of(module, hidden)
    if given is None or given.shape != hidden.shape:
        return None
    for gate, up, down in _places(layers):
        for activation in ACTIVATIONS:
            found = Gated(cast(Activation, activation), gate, up, down)
            with torch.no_grad():
                widened = halves(layers[gate](hidden), None if gate == up else layers[up](hidden))
                mine = layers[down](formulas.gated(*widened, found.activation))
            if _are_same(given, mine):
                return found
    return None


def halves(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """What one layer made of both, apart."""
    return (gate, up) if up is not None else cast(tuple[Tensor, Tensor], gate.chunk(2, dim=-1))


def _places(layers: dict[str, torch.nn.Linear]) -> Iterator[tuple[str, str, str]]:
    """Which layer may be which, by their shapes."""
    for gate, up, down in permutations(layers, 3):
        one, two, last = layers[gate], layers[up], layers[down]
        if one.weight.shape == two.weight.shape and (last.in_features, last.out_features) == one.weight.shape:
            yield gate, up, down
    for both, down in permutations(layers, 2):
        if layers[both].weight.shape == (2 * layers[down].in_features, layers[down].out_features):
            yield both, both, down


def _rotary(module: torch.nn.Module) -> str | None:
    """A global function in the code of its forward that turns queries and keys as the formula does."""
    forward = type(module).forward
    if not isinstance(forward, types.FunctionType):
        return None
    for name in forward.__code__.co_names:
        function = forward.__globals__.get(name)
        if isinstance(function, types.FunctionType) and _turns(function):
            return name
    return None


def _turns(function: Callable[..., object]) -> bool:
    """Whether it turns whole heads so; and if it knows heads of which it turns a part, these too."""
    return _turned(function, 8) is True and _turned(function, 4) is not False


def _turned(function: Callable[..., object], size: int) -> bool | None:
    """Whether it turns the first `size` of 8 numbers; None where it cannot."""
    queries, angles = _numbers(1, 2, 6, 8), _numbers(1, 6, size // 2).repeat(1, 1, 2)
    keys, cos, sin = queries[:, :1] + 1, angles.cos(), angles.sin()
    try:
        given = function(queries.clone(), keys.clone(), cos, sin)
    except of_libraries():
        return None
    if not isinstance(given, tuple) or len(given) != 2 or not all(isinstance(each, Tensor) for each in given):
        return False
    pairs = zip((queries, keys), given, strict=True)
    return all(_are_same(formulas.rotated(each, cos, sin), other) for each, other in pairs)


def _of(module: torch.nn.Module, hidden: Tensor) -> Tensor | None:
    """What it makes of hidden states; None where it takes something else too, or makes something else in training, as dropout does."""
    if len(inspect.signature(module.forward).parameters) != 1:
        return None
    try:
        with torch.no_grad():
            given, trained = module(hidden), module.train()(hidden)
    except of_libraries():  # it wants something else
        return None
    finally:
        module.eval()
    return given if isinstance(given, Tensor) and torch.equal(given, trained) else None


def _numbers(*shape: int) -> Tensor:
    """Between -1 and 1, always the same."""
    count = torch.Size(shape).numel()
    return ((torch.arange(count) * 2_654_435_761 % 1009) / 504.5 - 1).reshape(shape)


def _are_same(one: Tensor, two: Tensor) -> bool:
    return one.shape == two.shape and bool((one - two).norm() <= TOLERANCE * one.norm())
