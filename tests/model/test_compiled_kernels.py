"""Liger's kernels are compiled for an H100, which needs no GPU: what the compiler makes of them adds nothing by atomics.

It needs the extra `kernels`, and TRITON_INTERPRET not to be set.
"""

import re

import pytest

from tests import interpreted

H, F, N, S = "*bf16", "*fp32", "i32", "fp32"  # pointers to numbers, a whole number, a scalar
NORM = {"casting_mode": 0, "elementwise_affine": True, "BLOCK_SIZE": 4096}
GATED = {"n_cols": 14336, "BLOCK_SIZE": 16384}
HEADS = {"bs": 1, "cos_bs": 1, "n_qh": 32, "n_kh": 8, "hd": 128, "rd": 128, "BLOCK_SIZE": 32}
PADDED = {"pad_n_qh": 32, "pad_n_kh": 8, "pad_hd": 128, "pad_rd": 128}
# of Llama-3.1-8B: module and name; the types of arguments that vary, in order; what is compiled in
KERNELS = [
    ("rms_norm", "_rms_norm_forward_kernel", [H, N, H, N, F, N, F, N, N, S, S], NORM),
    (
        "rms_norm",
        "_rms_norm_backward_kernel",
        [H, N, H, N, H, N, F, N, F, N, F, N, N, N, S, N],
        {**NORM, "COMPUTE_DW": True, "X_dtype": "bfloat16"},
    ),
    ("swiglu", "_swiglu_forward_kernel", [H, H, H, N, S], GATED),
    ("swiglu", "_swiglu_backward_kernel", [H, H, H, N, S], GATED),
    ("geglu", "_geglu_tanh_forward_kernel", [H, H, H, N], GATED),
    ("geglu", "_geglu_tanh_backward_kernel", [H, H, H, N], GATED),
    ("rope", "_triton_rope", [H, N, H, N, F, N, F, N, N], {**HEADS, **PADDED, "BACKWARD_PASS": False}),
    ("rope", "_triton_rope", [H, N, H, N, F, N, F, N, N], {**HEADS, **PADDED, "BACKWARD_PASS": True}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("module", "name", "types", "constants"), KERNELS, ids=lambda value: str(value)[:32])
def test_a_kernel_compiles_for_a_gpu_and_adds_nothing_by_atomics(module, name, types, constants, tmp_path, monkeypatch):
    triton = pytest.importorskip("triton")
    pytest.importorskip("liger_kernel")
    if interpreted.INTERPRETED:
        pytest.skip("TRITON_INTERPRET was set")
    from importlib import import_module

    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(import_module(f"liger_kernel.ops.{module}"), name)
    given = {key: getattr(triton.language, value) if key == "X_dtype" else value for key, value in constants.items()}
    varying = iter(types)
    signature = {each: "constexpr" if each in given else next(varying) for each in kernel.arg_names}
    places = {(kernel.arg_names.index(key),): value for key, value in given.items()}
    made = triton.compile(ASTSource(kernel, signature, places), target=GPUTarget("cuda", 90, 32))
    assert made.asm["cubin"] and next(varying, None) is None
    assert not re.search(r"^\s*(@\S+\s+)?(atom|red)\.", made.asm["ptx"], re.MULTILINE)
