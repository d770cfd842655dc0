"""Triton's kernels run by its interpreter, on the CPU: their numbers, and nothing of their speed.

It needs the extra `kernels`, and TRITON_INTERPRET=1 from the start of the process, as torch may import triton; without them tests skip.
The interpreter of Triton 3.9 leaves float arguments Python's, calls no device's library, and multiplies the bits of bf16 as integers;
a compiled kernel does none of this.
"""

import os

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def prepare() -> None:
    """Adds to the interpreter what it lacks. Skips the test where there is none."""
    pytest.importorskip("triton")
    pytest.importorskip("liger_kernel")
    if not INTERPRETED:
        pytest.skip("TRITON_INTERPRET=1 was not set")
    import triton.language as tl
    from liger_kernel.ops import geglu, rms_norm
    from triton.runtime import interpreter

    if interpreter._convert_float is _rounded:
        return
    before = interpreter.InterpreterBuilder.binary_op

    def of_bf16(builder: object, left: object, right: object, op: object) -> object:
        if left.dtype.scalar != tl.bfloat16:
            return before(builder, left, right, op)
        return interpreter.TensorHandle(_to_bf16(op(_to_fp32(left.data), _to_fp32(right.data))), tl.bfloat16)

    interpreter.InterpreterBuilder.binary_op = of_bf16
    others["float"], others["argument"] = interpreter._convert_float, interpreter._implicit_cvt
    interpreter._convert_float, interpreter._implicit_cvt = _rounded, _argument
    rms_norm.rsqrt = lambda x: tl.rsqrt(x)  # the interpreter replaces tl.rsqrt later
    geglu.tanh = lambda x: 2 * tl.sigmoid(2 * x) - 1


others = {}


def _argument(value: object) -> object:
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    if not isinstance(value, float):
        return others["argument"](value)
    return tl.tensor(interpreter.TensorHandle(np.array([value], dtype=np.float32), tl.float32), tl.float32)


def _rounded(data: object, before: object, after: object, mode: object) -> object:
    """To the nearest, as a device rounds; the interpreter cuts."""
    import triton.language as tl

    if (before, after) == (tl.float32, tl.bfloat16):
        return _to_bf16(data)
    if (before, after) == (tl.bfloat16, tl.float32):
        return _to_fp32(data)
    return others["float"](data, before, after, mode)


def _to_fp32(data):
    import numpy as np

    return (data.astype(np.uint32) << 16).view(np.float32)


def _to_bf16(data):
    import numpy as np

    bits = np.ascontiguousarray(data, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
