"""What becomes of each kind of quantized checkpoint, decided from its config alone."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar, cast

from finetune.model.base.damaged import Json
from finetune.model.base.dequantized import bits_and_bytes, floats, hqq, integers
from finetune.model.base.dequantized.layouts import Block, Layout

ValueT = TypeVar("ValueT", int, str)
WHOLE = Block(None, None)
PACKED_BITS = (2, 3, 4, 5, 6, 7, 8)


class Refused(ValueError):
    """Settings under which a method's files are not read."""


@dataclass(frozen=True)
class Method:
    """A way to store weights in few bits, with the settings of one checkpoint."""

    name: str
    """As people call it."""
    layouts: tuple[Layout, ...]
    ignored: tuple[str, ...] = ()
    """Ends of names of tensors that only a quantized model uses, as for its activations."""
    stored: Literal["nf4", "fp4", "int8"] | None = None
    """The kind of bitsandbytes' weights, which may stay so under an adapter."""


def _fp8(said: Json) -> Method:
    named = said.get("weight_block_size")
    block = _pair(named)
    if named is not None and block is None:
        raise Refused(f"`weight_block_size` is {str(named)[:40]}")
    by_weight = (WHOLE, Block(1, None))
    # transformers takes a missing key for 128 x 128; AutoFP8 writes none, and one scale a weight
    blocks = (Block(*block),) if block else by_weight if "weight_block_size" in said else (Block(128, 128), WHOLE)
    layouts = floats.fp8("_scale_inv", blocks), floats.fp8("_scale", by_weight)
    return Method("fp8", layouts, _OF_ACTIVATIONS)


def _fbgemm(said: Json) -> Method:
    return Method("fp8", (floats.fp8("_scale", (Block(1, None),)),), ("input_scale_ub", *_OF_ACTIVATIONS))


def _gptq(said: Json) -> Method:
    bits = _one_of(said, "bits", (2, 3, 4, 8))
    form = said.get("checkpoint_format", "gptq")
    if form not in ("gptq", "gptq_v2"):
        raise Refused(f"`checkpoint_format` is {str(form)[:40]}, not gptq or gptq_v2")
    return Method(f"GPTQ with {bits} bits", (integers.gptq(bits, int(form == "gptq")),))


def _awq(said: Json) -> Method:
    _one_of(said, "bits" if "bits" in said else "w_bit", (4,))
    version = str(said.get("version", "gemm")).lower()
    if version != "gemm":
        raise Refused(f"`version` is {version[:40]}, not gemm")
    return Method("AWQ with 4 bits", (integers.awq(),))


def _bitsandbytes(said: Json) -> Method:
    if said.get("load_in_8bit"):
        return Method("bitsandbytes, int8", (bits_and_bytes.eight_bits(),), stored="int8")
    kind = _one_of(said, "bnb_4bit_quant_type", ("nf4", "fp4"))
    return Method(f"bitsandbytes, {kind}", (bits_and_bytes.four_bits(kind),), stored=cast(Literal["nf4", "fp4"], kind))


def _hqq(said: Json) -> Method:
    return Method("HQQ", (hqq.layout(),))


def _modelopt(said: Json) -> Method:
    algorithm = str(said.get("quant_algo")).upper()
    if algorithm == "FP8":
        return Method("fp8 (ModelOpt)", (floats.fp8("_scale", (WHOLE,)),), _OF_ACTIVATIONS)
    if algorithm == "NVFP4":
        layout = floats.nvfp4("weight", "weight_scale", "weight_scale_2", is_divided=False)
        return Method("NVFP4 (ModelOpt)", (layout,), _OF_ACTIVATIONS)
    raise Refused(f"`quant_algo` is {algorithm[:40]}, not FP8 or NVFP4")


def _compressed_tensors(said: Json) -> Method:
    groups = said.get("config_groups")
    if not isinstance(groups, dict) or not groups or len(groups) > 64:
        raise Refused("it has no config_groups")
    if said.get("sparsity_config"):
        raise Refused("its weights are sparse as well")
    found: dict[str, tuple[set[int], set[Block]]] = {}
    for group in groups.values():
        form = (group.get("format") if isinstance(group, dict) else None) or said.get("format")
        weights = group.get("weights") if isinstance(group, dict) else None
        if form not in FORMATS or not isinstance(weights, dict):
            raise Refused(f"a group of its weights has the format {str(form)[:40]}")
        bits, blocks = found.setdefault(str(form), (set(), set()))
        bits.add(_one_of(weights, "num_bits", PACKED_BITS))
        blocks.add(_block(weights))
    layouts = [layout for form, (bits, blocks) in found.items() for layout in FORMATS[form](bits, tuple(blocks))]
    return Method(f"compressed-tensors, {' and '.join(sorted(found))}", tuple(layouts), _OF_ACTIVATIONS)


def _block(weights: Json) -> Block:
    """The part of a weight that shares a scale, by the names of compressed-tensors' strategies."""
    strategy, size = weights.get("strategy"), weights.get("group_size")
    if strategy == "tensor":
        return WHOLE
    if strategy == "channel":
        return Block(1, None)
    if strategy in ("group", "tensor_group") and isinstance(size, int) and size > 0:
        return Block(1, size)
    if strategy == "block" and (structure := _pair(weights.get("block_structure"))):
        return Block(*structure)
    raise Refused(f"its weights are scaled by {str(strategy)[:40]}")


Layouts = Callable[[set[int], tuple[Block, ...]], list[Layout]]
FORMATS: dict[str, Layouts] = {
    "float-quantized": lambda bits, blocks: [floats.fp8("_scale", blocks)],
    "int-quantized": lambda bits, blocks: [integers.int8(blocks)],
    "naive-quantized": lambda bits, blocks: [floats.fp8("_scale", blocks), integers.int8(blocks)],
    "pack-quantized": lambda bits, blocks: [integers.packed(one, blocks) for one in sorted(bits)],
    "nvfp4-pack-quantized": lambda bits, blocks: [
        floats.nvfp4("weight_packed", "weight_scale", "weight_global_scale", is_divided=True)
    ],
    "mxfp4-pack-quantized": lambda bits, blocks: [floats.mxfp4("weight_packed", "weight_scale")],
}
_OF_ACTIVATIONS = (
    *("input_scale", "activation_scale", "output_scale", ".k_scale", ".v_scale", ".q_scale"),
    *("input_global_scale", "input_zero_point", "output_zero_point", ".k_zero_point", ".v_zero_point"),
)
METHODS: dict[str, Callable[[Json], Method]] = {
    "fp8": _fp8,
    "fbgemm_fp8": _fbgemm,
    "compressed-tensors": _compressed_tensors,
    "modelopt": _modelopt,
    "gptq": _gptq,
    "awq": _awq,
    "bitsandbytes": _bitsandbytes,
    "hqq": _hqq,
}


def _one_of(said: Json, key: str, allowed: tuple[ValueT, ...]) -> ValueT:
    value = said.get(key)
    if isinstance(value, bool) or value not in allowed:
        raise Refused(f"`{key}` is {str(value)[:40]}, not {' or '.join(map(str, allowed))}")
    return next(one for one in allowed if one == value)


def _pair(value: object) -> tuple[int, int] | None:
    """Rows and columns of a block; None if a config says something else."""
    if not isinstance(value, list) or len(value) != 2 or not all(type(one) is int and one > 0 for one in value):
        return None
    return value[0], value[1]
