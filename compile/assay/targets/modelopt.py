"""Write a checkpoint as NVIDIA's ModelOpt does, which TensorRT-LLM, vLLM and SGLang read.

FP8: weight E4M3 [out, in], weight_scale and input_scale float32 scalars. NVFP4: weight uint8 [out, in / 2], two E2M1 codes a byte, the
even input in the low bits; weight_scale E4M3 [out, in / 16]; weight_scale_2 and input_scale float32 scalars, the reciprocals of our
global scales. Key/value cache: k_proj.k_scale and v_proj.v_scale, float32 scalars.

An NVFP4 weight is level · (weight_scale · weight_scale_2) here and level · (scale / global scale) as the quantizer has it: the same
but for the last bits, because the reciprocal is rounded. Files are compared with this format's arithmetic, exactly; and that its scales
are the chosen ones within 2⁻²² of each (a float32's last bit is 2⁻²³) is checked, too.

Source: ModelOpt 0.43's unified Hugging Face export, as read by TensorRT-LLM 1.2 (`quantization/modelopt_config.py`) and vLLM 0.32
(`layers/quantization/modelopt.py`): both know a nested configuration, in hf_quant_config.json, and a flat one, in config.json.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from assay import __version__
from assay.errors import AssayError
from assay.models.architectures import LinearShape
from assay.quantize.packing import pack, unpack
from assay.quantize.schemes import WeightScheme, weight_scheme
from assay.quantize.store import QuantizedModule
from assay.quantize.weights import QuantizedWeight
from assay.targets.checkpoint_writer import (
    CheckpointFormat,
    Configuration,
    Contents,
    Read,
    build_baseline,
)

__all__ = ["build_baseline", "build_candidate", "pack_module", "read_back", "rendered"]

_LARGEST_DIFFERENCE = 2.0**-22
_RECIPROCAL = (
    "modelopt stores the reciprocal of each NVFP4 global scale, rounded to float32: weights and inputs may differ from the "
    "quantizer's in the last bits of their scales, by less than one part in four million."
)


def pack_module(module: QuantizedModule, _: torch.dtype) -> dict[str, Tensor]:
    """A module's tensors by the last part of their names."""
    weight = module.weight
    assert module.input_scale is not None
    if weight.global_scale is None:
        return {
            "weight": weight.codes.view(torch.float8_e4m3fn),
            "weight_scale": weight.scales[0, 0],
            "input_scale": module.input_scale.view(()),
        }
    return {
        "weight": pack(weight.codes, 4),
        "weight_scale": weight.e4m3_scales(),
        "weight_scale_2": (1 / weight.global_scale).view(()),
        "input_scale": (1 / module.input_scale).view(()),
    }


def rendered(module: QuantizedModule) -> QuantizedModule:
    """The module with the weight's scales as this format multiplies them."""
    weight = module.weight
    if weight.global_scale is None:
        return module
    scales = weight.e4m3_scales().float() * (1 / weight.global_scale)
    if not torch.allclose(scales, weight.scales, rtol=_LARGEST_DIFFERENCE, atol=0):
        raise AssayError(
            f"modelopt cannot hold these NVFP4 scales: they are no E4M3 values over the global scale {float(weight.global_scale):g}, "
            "or its reciprocal is not exact enough in float32. Compile for compressed-tensors, which stores that scale itself."
        )
    return replace(module, weight=replace(weight, scales=scales))


def _unpack_module(read: Read, scheme: WeightScheme, linear: LinearShape) -> QuantizedWeight:
    if scheme.scale == "float":
        scales = read("weight_scale").expand(linear.out_features, 1)
        return QuantizedWeight(scheme, read("weight").view(torch.uint8), scales, None)
    scales = read("weight_scale").float() * read("weight_scale_2")
    return QuantizedWeight(scheme, unpack(read("weight"), 4, linear.in_features), scales, None)


def _rename(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    """Scales of the key/value cache are scalars of the Linears that the keys and values come from."""
    attention, _, part = name.rpartition(".")
    if part not in ("k_scale", "v_scale"):
        return name, tensor
    return f"{attention}.{part[0]}_proj.{part}", tensor.float().view(())


def _configure(contents: Contents) -> Configuration:
    (scheme,) = set(contents.assigned.values())
    number: dict[str, Any] = {"dynamic": False, "num_bits": scheme.bits, "type": "float"}
    grouped = {"group_size": scheme.group_size} if scheme.group_size else {}
    group = {"input_activations": number | grouped, "weights": number | grouped, "targets": ["Linear"]}
    cache = {"kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"}} if contents.kv_cache else {}
    return {
        "config_groups": {"group_0": group},
        "ignore": contents.unquantized,
        "producer": {"name": "assay", "version": __version__},
        "quant_algo": scheme.name,
        "quant_method": "modelopt",
        **grouped,
        **cache,
    }


def _files(quantization: Configuration) -> Mapping[str, Configuration]:
    """The nested form of the same, which TensorRT-LLM asks for first."""
    nested = {
        "exclude_modules": quantization["ignore"],
        "kv_cache_quant_algo": "FP8" if "kv_cache_scheme" in quantization else None,
        "quant_algo": quantization["quant_algo"],
    }
    if "group_size" in quantization:
        nested["group_size"] = quantization["group_size"]
    return {"hf_quant_config.json": {"producer": quantization["producer"], "quantization": nested}}


def _scheme_of(config: Configuration, _: str) -> WeightScheme:
    return weight_scheme(config["quant_algo"])


def _notes(schemes: Iterable[WeightScheme]) -> tuple[str, ...]:
    return (_RECIPROCAL,) if any(scheme.scale == "e4m3" for scheme in schemes) else ()


_FORMAT = CheckpointFormat(
    name="modelopt",
    marks=("weight_scale",),
    configure=_configure,
    pack=pack_module,
    scheme_of=_scheme_of,
    unpack=_unpack_module,
    files=_files,
    rename=_rename,
    rendered=rendered,
    notes=_notes,
)
build_candidate, read_back = _FORMAT.build_candidate, _FORMAT.read_back
