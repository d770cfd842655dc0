"""Tiny quantized checkpoints, made here by the published layouts: codes are chosen first, so what they stand for is known exactly.

Each kind takes a weight (out, in), and gives the tensors in its place, by the ends of their names, and the numbers they stand for.
Packing goes through whole numbers of Python, and has nothing in common with the code that it tests.
"""

import json
import shutil
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes (rows, n) as int32 words (rows, ceil(n * bits / 32))."""
    length = -(-codes.shape[1] * bits // 32)
    made = []
    for row in codes.long().tolist():
        number = sum(code << bits * place for place, code in enumerate(row))
        made.append(torch.frombuffer(bytearray(number.to_bytes(4 * length, "little")), dtype=torch.int32))
    return torch.stack(made)


def blocks(scales: torch.Tensor, rows: int, columns: int, shape: torch.Size) -> torch.Tensor:
    """The scale of each element, by its place."""
    return torch.stack(
        [torch.stack([scales[r // rows, c // columns] for c in range(shape[1])]) for r in range(shape[0])]
    )


def draw(*shape: int, below: int) -> torch.Tensor:
    return torch.randint(0, below, shape)


def scales(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.rand(shape) * 0.02 + 0.01).to(dtype)


def fp8(weight, rows=16, columns=24, end="weight_scale_inv"):
    grid = [-(-weight.shape[0] // rows), -(-weight.shape[1] // columns)]
    scale = scales(*grid)
    codes = (torch.randn(weight.shape) * 4).to(torch.float8_e4m3fn)
    return {"weight": codes, end: scale}, codes.float() * blocks(scale, rows, columns, weight.shape)


def fp8_of_a_row(weight):
    parts, numbers = fp8(weight, 1, weight.shape[1], "weight_scale")
    return parts | {"input_scale": torch.ones(())}, numbers


def fp8_of_a_tensor(weight):
    codes, scale = (torch.randn(weight.shape) * 4).to(torch.float8_e4m3fn), scales()
    return {"weight": codes, "weight_scale": scale, "input_scale": torch.ones(())}, codes.float() * scale


def gptq(weight, bits=4, shift=1, order=False):
    (outputs, inputs), groups = weight.shape, 2
    codes, zeros = draw(inputs, outputs, below=2**bits), draw(groups, outputs, below=2**bits - 1) + shift
    scale, index = scales(groups, outputs, dtype=torch.float16), torch.arange(inputs) // (inputs // groups)
    index = index[torch.randperm(inputs)] if order else index
    parts = {"qweight": words(codes.T, bits).T.contiguous(), "qzeros": words(zeros - shift, bits), "scales": scale}
    return parts | {"g_idx": index.int()}, ((codes - zeros[index]) * scale.float()[index]).T


def awq(weight):
    (outputs, inputs), groups = weight.shape, 2
    codes, zeros = draw(inputs, outputs, below=16), draw(groups, outputs, below=16)
    scale = scales(groups, outputs, dtype=torch.float16)
    place = torch.arange(outputs).view(-1, 8)[:, [0, 2, 4, 6, 1, 3, 5, 7]].flatten()  # AutoAWQ's order_map
    parts = {"qweight": words(codes[:, place], 4), "qzeros": words(zeros[:, place], 4), "scales": scale}
    each = inputs // groups
    return parts, ((codes - zeros.repeat_interleave(each, 0)) * scale.float().repeat_interleave(each, 0)).T


def packed(weight, bits=4, size=16, zero=False):
    outputs, inputs = weight.shape
    codes, groups = draw(outputs, inputs, below=2**bits), inputs // size
    scale, zeros = scales(outputs, groups, dtype=torch.bfloat16), torch.full((outputs, groups), 2 ** (bits - 1))
    parts = {"weight_packed": words(codes, bits), "weight_scale": scale, "weight_shape": torch.tensor(weight.shape)}
    if zero:
        zeros = draw(outputs, groups, below=2**bits)
        parts["weight_zero_point"] = words(zeros.T, bits).T.contiguous()
    each = [one.float().repeat_interleave(size, 1) for one in (zeros, scale)]
    return parts, (codes - each[0]) * each[1]


def int8(weight):
    codes, scale = draw(*weight.shape, below=255).sub(127).to(torch.int8), scales(len(weight), 1, dtype=torch.bfloat16)
    return {"weight": codes, "weight_scale": scale / 16}, codes.float() * (scale / 16).float()


def nvfp4(weight, names=("weight_packed", "weight_scale", "weight_global_scale"), is_divided=True):
    outputs, inputs = weight.shape
    codes, scale = (
        draw(outputs, inputs, below=16),
        (torch.rand(outputs, inputs // 16) * 200 + 1).to(torch.float8_e4m3fn),
    )
    whole = torch.tensor(0.0003)
    pairs = (codes[:, ::2] + 16 * codes[:, 1::2]).to(torch.uint8)
    parts = dict(zip(names, (pairs, scale, (1 / whole)[None] if is_divided else whole), strict=True))
    each = scale.float() / (1 / whole) if is_divided else scale.float() * whole
    return parts, FP4[codes] * each.repeat_interleave(16, 1)


def modelopt_nvfp4(weight):
    parts, numbers = nvfp4(weight, ("weight", "weight_scale", "weight_scale_2"), is_divided=False)
    return parts | {"input_scale": torch.ones(())}, numbers


def mxfp4(weight):
    outputs, inputs = weight.shape
    codes, power = draw(outputs, inputs, below=16), torch.randint(118, 124, (outputs, inputs // 32), dtype=torch.uint8)
    pairs = (codes[:, ::2] + 16 * codes[:, 1::2]).to(torch.uint8)
    numbers = FP4[codes] * torch.exp2(power.float() - 127).repeat_interleave(32, 1)
    return {"weight_packed": pairs, "weight_scale": power}, numbers


def nf4(weight, nested=True):
    count = weight.numel()
    codes, table = draw(count, below=16), torch.sort(torch.randn(16))[0]
    parts = {"weight.quant_map": table}
    said = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(weight.shape)}
    if nested:
        first, second, offset = draw(count // 64, below=256), torch.sort(torch.rand(256))[0], 0.03125
        parts |= {"weight.absmax": first.to(torch.uint8), "weight.nested_quant_map": second}
        parts["weight.nested_absmax"] = scales(-(-(count // 64) // 256))
        said |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
        largest = second[first] * parts["weight.nested_absmax"].repeat_interleave(256)[: count // 64] + offset
    else:
        largest = parts["weight.absmax"] = scales(count // 64)
    state = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)
    parts |= {"weight": (16 * codes[::2] + codes[1::2]).to(torch.uint8)[:, None]}
    parts |= {"weight.quant_state.bitsandbytes__nf4": state}
    return parts, (table[codes] * largest.repeat_interleave(64)).view(weight.shape)


def llm_int8(weight):
    codes, largest = draw(*weight.shape, below=255).sub(127).to(torch.int8), scales(len(weight))
    parts = {"weight": codes, "SCB": largest, "weight_format": torch.zeros((), dtype=torch.uint8)}
    return parts, codes.float() * largest[:, None] * 7.874015718698502e-3


def hqq(weight, bits=4, size=16):
    count = weight.numel()
    codes, rows = draw(count // size, size, below=2**bits), count // size
    scale, zero = scales(rows, 1, dtype=torch.float16), (torch.rand(rows, 1) * 2**bits).half()
    each = {"nbits": bits, "group_size": size, "axis": 1}
    parts = {name: torch.tensor(value, dtype=torch.int32) for name, value in each.items()}
    half = rows // 2
    parts |= {"W_q": (16 * codes[:half] + codes[half:]).to(torch.uint8), "scale": scale, "zero": zero}
    parts |= {"packing": torch.tensor(list(b"4bit_u8"), dtype=torch.uint8), "shape": torch.tensor(weight.shape)}
    parts |= {name: torch.tensor(0, dtype=torch.uint8) for name in ("view_as_float", "quant_scale", "quant_zero")}
    return parts, ((codes.float() - zero.float()) * scale.float()).view(weight.shape)


def tensors_of(form, bits, **weights):
    """A config of compressed-tensors with one group."""
    group = {"targets": ["Linear"], "weights": {"num_bits": bits, **weights}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}


KINDS = {
    "fp8": (fp8, {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 24]}),
    "fp8 of AutoFP8": (fp8_of_a_tensor, {"quant_method": "fp8", "activation_scheme": "static"}),
    "fp8 of fbgemm": (fp8_of_a_row, {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}),
    "fp8 of ModelOpt": (fp8_of_a_tensor, {"quant_method": "modelopt", "quant_algo": "FP8"}),
    "fp8 of compressed-tensors": (
        fp8_of_a_row,
        tensors_of("float-quantized", 8, type="float", strategy="channel", symmetric=True),
    ),
    "int8 of compressed-tensors": (int8, tensors_of("int-quantized", 8, type="int", strategy="channel")),
    "int4 of compressed-tensors": (
        packed,
        tensors_of("pack-quantized", 4, type="int", strategy="group", group_size=16, symmetric=True),
    ),
    "int3 with zero points": (
        lambda weight: packed(weight, 3, zero=True),
        tensors_of("pack-quantized", 3, type="int", strategy="group", group_size=16, symmetric=False),
    ),
    "NVFP4": (
        nvfp4,
        tensors_of("nvfp4-pack-quantized", 4, type="float", strategy="tensor_group", group_size=16),
    ),
    "NVFP4 of ModelOpt": (modelopt_nvfp4, {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
    "MXFP4 of compressed-tensors": (
        mxfp4,
        tensors_of("mxfp4-pack-quantized", 4, type="float", strategy="group", group_size=32),
    ),
    "GPTQ": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False}),
    "GPTQ with 3 bits": (lambda weight: gptq(weight, 3, order=True), {"quant_method": "gptq", "bits": 3}),
    "GPTQ v2": (
        lambda weight: gptq(weight, 8, shift=0),
        {"quant_method": "gptq", "bits": 8, "checkpoint_format": "gptq_v2"},
    ),
    "AWQ": (awq, {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm"}),
    "nf4": (
        nf4,
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    ),
    "nf4 without nested scales": (
        lambda weight: nf4(weight, nested=False),
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    ),
    "LLM.int8()": (llm_int8, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
    "HQQ": (hqq, {"quant_method": "hqq", "quant_config": {}}),
}


def quantize(base: Path, target: Path, kind: str) -> dict[str, torch.Tensor]:
    """A copy of a base whose linear layers are quantized; returns the numbers that its weights stand for, rounded once to bf16."""
    shutil.copytree(base, target)
    torch.manual_seed(0)
    make, said = KINDS[kind]
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(base / "model.safetensors").items()}
    numbers = dict(tensors)
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        parts, exact = make(tensors.pop(name))
        stem = name.removesuffix("weight")
        tensors |= {stem + end: tensor.contiguous() for end, tensor in parts.items()}
        numbers[name] = exact.float().bfloat16().contiguous()
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    edit(target, quantization_config=said, dtype="bfloat16")
    return numbers


def in_bits(base: Path, target: Path, kind: str) -> Path:
    """A copy of a base as transformers and bitsandbytes themselves save it in bf16 and `nf4`, `fp4` or `int8`."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    of_4_bits = {"bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": kind == "nf4"}
    config = BitsAndBytesConfig(**({"load_in_8bit": True} if kind == "int8" else {"load_in_4bit": True, **of_4_bits}))
    shutil.copytree(base, target)
    (target / "model.safetensors").unlink()
    with warnings.catch_warnings(action="ignore"):
        model = AutoModelForCausalLM.from_pretrained(
            base, quantization_config=config, dtype=torch.bfloat16, device_map="cpu"
        )
        model.save_pretrained(target)
    return target


def edit(directory: Path, **changes: object) -> None:
    said = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(said | changes))
