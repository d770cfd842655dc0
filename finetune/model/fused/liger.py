"""The kernels of `liger-kernel`, of which the same numbers get the same bits on a device. Hsu et al. 2024, arXiv 2410.10989.

They choose no block by trying, and add without atomics: the gradient of a norm's weight is one sum for each multiprocessor, so a
function of shapes and device.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError
from typing import cast

from torch import Tensor

from finetune import version
from finetune.model.fused.formulas import Activation, Norm

PACKAGES = (("liger-kernel",), ("triton", "pytorch-triton", "pytorch-triton-rocm"))
"""Each by any of its names: other builds of torch bring Triton under their own."""


def versions() -> str | None:
    """Both packages with their versions, as runs record them; None where one is missing."""
    found = [_version(names) for names in PACKAGES]
    return ", ".join(each for each in found if each) if all(found) else None


def _version(names: tuple[str, ...]) -> str | None:
    for name in names:
        with suppress(PackageNotFoundError):
            return f"{name} {version(name)}"
    return None


def is_interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on any device: thousands of times slower, to look into them."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@contextmanager
def told_as_usual() -> Iterator[None]:
    """What Triton raises for a kernel that it cannot compile or start, as the RuntimeError that torch would raise. It also runs a compiler."""
    try:
        yield
    except _errors_of_triton() as error:
        raise RuntimeError(f"{type(error).__name__}: {error}") from error


def _errors_of_triton() -> tuple[type[Exception], ...]:
    """Those of the compiler that it starts, and its own, if it is loaded: else it raised nothing."""
    loaded = sys.modules.get("triton.errors")
    return (subprocess.SubprocessError, *((loaded.TritonError,) if loaded else ()))


def norm(hidden: Tensor, weight: Tensor, found: Norm, eps: float) -> Tensor:
    """As `formulas.norm`, in the type of `hidden` whatever that of the weight is."""
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    # Not in place: behind a norm, a residual stream may need the gradient that it would write to.
    made = LigerRMSNormFunction.apply(hidden, weight, eps, found.offset, found.casting, False)
    return cast(Tensor, made)


def gated(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """As `formulas.gated`. The backward pass writes the gradients over both, which nothing else keeps."""
    from liger_kernel.ops.geglu import LigerGELUMulFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    function = LigerSiLUMulFunction if activation == "silu" else LigerGELUMulFunction
    return cast(Tensor, function.apply(gate, up))


def rotated(queries: Tensor, keys: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As `formulas.rotated` of both, which it overwrites, as its backward pass does their gradients."""
    from liger_kernel.ops.rope import LigerRopeFunction

    return cast(tuple[Tensor, Tensor], LigerRopeFunction.apply(queries, keys, cos, sin))
