"""How compressed-tensors lays out a quantized Linear: its tensors, and the arguments in config.json that name the scheme.

pack-quantized (weight-only integers): codes packed along the input channels into int32, lowest bits first; zero points along the output
channels; symmetric weights store none. int-quantized, float-quantized: one byte a weight. nvfp4-pack-quantized, mxfp4-pack-quantized: two
E2M1 codes a byte, the even channel in the low bits; E4M3 scales under a global scale, or E8M0 exponents.

Source: compressed-tensors 0.20, `compressors` and `quantization.quant_scheme`, as run by the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from assay.models.architectures import LinearShape
from assay.quantize.packing import pack, unpack
from assay.quantize.schemes import ActivationScheme, WeightScheme
from assay.quantize.store import QuantizedModule
from assay.quantize.weights import QuantizedWeight
from assay.targets.words import pack_words, unpack_words

_E8M0_BIAS = 127
_SCALE_DTYPES = {"e4m3": "torch.float8_e4m3fn", "e8m0": "torch.uint8"}
KV_CACHE = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}


def format_of(scheme: WeightScheme) -> str:
    """The name of the format that stores a scheme."""
    if scheme.scale != "float":
        return "nvfp4-pack-quantized" if scheme.scale == "e4m3" else "mxfp4-pack-quantized"
    if scheme.kind == "float":
        return "float-quantized"
    return "pack-quantized" if scheme.activations is None else "int-quantized"


def arguments_of(scheme: WeightScheme) -> dict[str, Any]:
    """A group of config.json, without its targets."""
    strategy = "group" if scheme.group_size else "channel"
    weights: dict[str, Any] = {"num_bits": scheme.bits, "type": scheme.kind, "symmetric": scheme.symmetric}
    if scheme.scale == "e4m3":
        strategy = "tensor_group"
    elif scheme.block_rows == 0:
        strategy = "tensor"
    elif scheme.block_rows > 1:
        strategy = "block"
        weights["block_structure"] = [scheme.block_rows, scheme.group_size]
    weights |= {"strategy": strategy, "dynamic": False}
    weights["group_size"] = scheme.group_size or None if strategy != "block" else None
    return {
        "format": format_of(scheme),
        "input_activations": _activation_arguments(scheme.activations) if scheme.activations else None,
        "output_activations": None,
        "weights": weights | _scale_arguments(scheme.scale),
    }


def _activation_arguments(scheme: ActivationScheme) -> dict[str, Any]:
    strategy: str = "tensor" if scheme.static else "token"
    dynamic: bool | str = not scheme.static
    if scheme.scale == "e4m3":
        strategy, dynamic = "tensor_group", "local"
    elif scheme.group_size:
        strategy = "group"
    arguments = {
        "num_bits": scheme.bits,
        "type": scheme.kind,
        "symmetric": True,
        "strategy": strategy,
        "dynamic": dynamic,
        "group_size": scheme.group_size or None,
    }
    return arguments | _scale_arguments(scheme.scale)


def _scale_arguments(scale: str) -> dict[str, str]:
    dtype = _SCALE_DTYPES.get(scale)
    return {} if dtype is None else {"scale_dtype": dtype, "zp_dtype": dtype}


def scheme_of(arguments: dict[str, Any], written: str) -> WeightScheme:
    """The scheme of a group's `weights` and `format`, as far as its weights' bytes depend on it."""
    strategy = arguments["strategy"]
    group_size, block_rows = arguments.get("group_size") or 0, 0 if strategy == "tensor" else 1
    if strategy == "block":
        block_rows, group_size = arguments["block_structure"]
    scale = {"nvfp4-pack-quantized": "e4m3", "mxfp4-pack-quantized": "e8m0"}.get(written, "float")
    activations = ActivationScheme("int", 8) if written == "int-quantized" else None
    return WeightScheme(
        "",
        arguments["num_bits"],
        arguments["symmetric"],
        group_size,
        arguments["type"],
        block_rows,
        scale,  # pyright: ignore[reportArgumentType]
        activations,
    )


def pack_module(module: QuantizedModule, dtype: torch.dtype) -> dict[str, Tensor]:
    """A module's tensors by the last part of their names; scales stored as floats have the model's own dtype."""
    weight, scheme = module.weight, module.weight.scheme
    scales = weight.scales if scheme.block_rows == 1 else weight.scales[:: scheme.block_rows or len(weight.scales)]
    tensors: dict[str, Tensor] = {}
    written = format_of(scheme)
    if written == "pack-quantized":
        tensors["weight_packed"] = pack_words(weight.codes, scheme.bits)
        tensors["weight_shape"] = torch.tensor(weight.codes.shape, dtype=torch.int64)
        if weight.zero_points is not None:
            tensors["weight_zero_point"] = _pack_rows(weight.zero_points, scheme.bits)
    elif written == "int-quantized":
        tensors["weight"] = (weight.codes.int() - scheme.symmetric_zero_point).to(torch.int8)
    elif written == "float-quantized":
        tensors["weight"] = weight.codes.view(torch.float8_e4m3fn)
    else:
        tensors["weight_packed"] = pack(weight.codes, 4)
    if scheme.scale == "e8m0":
        tensors["weight_scale"] = (torch.frexp(scales).exponent - 1 + _E8M0_BIAS).to(torch.uint8)
    elif weight.global_scale is not None:
        tensors["weight_scale"] = weight.e4m3_scales()
        tensors["weight_global_scale"] = weight.global_scale
    else:
        # One number for the whole tensor is a vector of one.
        tensors["weight_scale"] = (scales if scheme.block_rows else scales.view(1)).to(dtype)
    if module.input_scale is not None:
        static = scheme.activations is not None and scheme.activations.static
        tensors["input_scale" if static else "input_global_scale"] = (
            module.input_scale.to(dtype) if static else module.input_scale
        )
    return tensors


def unpack_module(read: Callable[[str], Tensor], scheme: WeightScheme, linear: LinearShape) -> QuantizedWeight:
    """A weight out of a module's tensors; read: the tensor by the last part of its name."""
    rows, columns = linear.out_features, linear.in_features
    written, zero_points, global_scale = format_of(scheme), None, None
    if written == "pack-quantized":
        codes = unpack_words(read("weight_packed"), scheme.bits, columns)
        zero_points = None if scheme.symmetric else _unpack_rows(read("weight_zero_point"), scheme.bits, rows)
    elif written == "int-quantized":
        codes = (read("weight").int() + scheme.symmetric_zero_point).to(torch.uint8)
    elif written == "float-quantized":
        codes = read("weight").view(torch.uint8)
    else:
        codes = unpack(read("weight_packed"), 4, columns)
    scales = read("weight_scale")
    if scheme.scale == "e8m0":
        scales = torch.ldexp(torch.ones(scales.shape), scales.int() - _E8M0_BIAS)
    elif scheme.scale == "e4m3":
        global_scale = read("weight_global_scale")
        scales = scales.float() / global_scale
    scales = scales.float()
    if scheme.block_rows != 1:
        scales = scales.view(-1, scheme.groups(columns)).repeat_interleave(scheme.block_rows or rows, dim=0)[:rows]
    return QuantizedWeight(scheme, codes, scales, zero_points, global_scale)


def _pack_rows(values: Tensor, bits: int) -> Tensor:
    """uint8 [rows, groups] → int32 [ceil(rows · bits / 32), groups], packed along the rows."""
    return pack_words(values.T.contiguous(), bits).T.contiguous()


def _unpack_rows(packed: Tensor, bits: int, rows: int) -> Tensor:
    return unpack_words(packed.T, bits, rows).T.contiguous()
