"""Write a GPTQ checkpoint (AutoGPTQ's layout, as GPTQModel goes on with it), which vLLM, SGLang and GPTQModel read.

qweight int32 [in · bits / 32, out]: the codes of consecutive inputs. qzeros int32 [groups, out · bits / 32]: the zero points of
consecutive outputs. scales [groups, out]. g_idx int32 [in]: the group of each input. A weight is (code − zero point) · scale.

checkpoint_format "gptq" stores every zero point less one, which zero point 0 does not survive. It is what engines know, and right
for symmetric schemes; asymmetric ones are "gptq_v2", which stores them as they are.

Any method of quantization can be stored so: the format shares only its name with the algorithm.

Source: GPTQModel 7.4, `nn_modules/qlinear/__init__.py`, pack_original, and `utils/model.py`, convert_gptq_v1_to_v2_format.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from assay.errors import AssayError
from assay.models.architectures import LinearShape
from assay.quantize.schemes import WeightScheme
from assay.quantize.store import QuantizedModule
from assay.quantize.weights import QuantizedWeight
from assay.targets.checkpoint_writer import (
    CheckpointFormat,
    Configuration,
    Contents,
    Read,
    build_baseline,
)
from assay.targets.words import pack_words, unpack_words

__all__ = ["build_baseline", "build_candidate", "pack_module", "read_back"]


def pack_module(module: QuantizedModule, dtype: torch.dtype) -> dict[str, Tensor]:
    """A module's tensors by the last part of their names; dtype: the scales'."""
    weight, scheme = module.weight, module.weight.scheme
    points = weight.zero_points
    if points is None:
        points = torch.full(weight.scales.shape, scheme.symmetric_zero_point - 1, dtype=torch.uint8)
    return {
        "qweight": pack_words(weight.codes, scheme.bits).T,
        "qzeros": pack_words(points.T, scheme.bits),
        "scales": weight.scales.T.to(dtype),
        "g_idx": _groups(scheme, weight.codes.shape[1]),
    }


def _unpack_module(read: Read, scheme: WeightScheme, linear: LinearShape) -> QuantizedWeight:
    if not torch.equal(read("g_idx"), _groups(scheme, linear.in_features)):
        raise AssayError(f"{linear.name}.g_idx: the compiled model's groups are not consecutive inputs.")
    codes = unpack_words(read("qweight").T, scheme.bits, linear.in_features)
    points = unpack_words(read("qzeros"), scheme.bits, linear.out_features).T
    return QuantizedWeight(scheme, codes, read("scales").T.float(), points + int(scheme.symmetric))


def _groups(scheme: WeightScheme, in_features: int) -> Tensor:
    return torch.arange(in_features, dtype=torch.int32) // (scheme.group_size or in_features)


def _configure(contents: Contents) -> Configuration:
    (scheme,) = set(contents.assigned.values())
    return {
        "bits": scheme.bits,
        "checkpoint_format": "gptq" if scheme.symmetric else "gptq_v2",
        "desc_act": False,
        "group_size": scheme.group_size or -1,
        "lm_head": contents.shape.architecture.head in contents.assigned,
        "pack_dtype": "int32",
        "quant_method": "gptq",
        "sym": scheme.symmetric,
    }


def _files(quantization: Configuration) -> Mapping[str, Configuration]:
    """Older readers look for it there."""
    return {"quantize_config.json": quantization}


def _scheme_of(config: Configuration, _: str) -> WeightScheme:
    return WeightScheme("", config["bits"], config["checkpoint_format"] == "gptq", max(config["group_size"], 0))


_FORMAT = CheckpointFormat(
    name="gptq",
    marks=("qweight",),
    configure=_configure,
    pack=pack_module,
    scheme_of=_scheme_of,
    unpack=_unpack_module,
    files=_files,
    half_scales=True,
)
build_candidate, read_back = _FORMAT.build_candidate, _FORMAT.read_back
