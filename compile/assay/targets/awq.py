"""Write an AWQ checkpoint in AutoAWQ's GEMM layout, the one that vLLM and SGLang read.

qweight int32 [in, out / 8]: a word holds the codes of 8 consecutive outputs, from its lowest bits up those of the outputs 0 2 4 6 1 3 5 7.
qzeros int32 [groups, out / 8]: zero points, likewise. scales [groups, out]. A weight is (code − zero point) · scale.
The layout has no form without zero points (AutoAWQ refuses to make one): symmetric schemes store the constant 8.

Source: AutoAWQ 0.2, `awq/modules/linear/gemm.py`, WQLinear_GEMM.from_linear.
"""

from __future__ import annotations

import torch
from torch import Tensor

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

_BITS = 4
_ORDER = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])


def pack_module(module: QuantizedModule, dtype: torch.dtype) -> dict[str, Tensor]:
    """A module's tensors by the last part of their names; dtype: the scales'."""
    weight = module.weight
    points = weight.zero_points
    if points is None:
        points = torch.full(weight.scales.shape, weight.scheme.symmetric_zero_point, dtype=torch.uint8)
    return {
        "qweight": _interleave(weight.codes.T),
        "qzeros": _interleave(points.T),
        "scales": weight.scales.T.to(dtype),
    }


def _unpack_module(read: Read, scheme: WeightScheme, linear: LinearShape) -> QuantizedWeight:
    codes, points = (_deinterleave(read(part), linear.out_features).T for part in ("qweight", "qzeros"))
    return QuantizedWeight(scheme, codes.contiguous(), read("scales").T.float(), points)


def _interleave(codes: Tensor) -> Tensor:
    """uint8 [rows, out] → int32 [rows, out / 8]."""
    return pack_words(codes.unflatten(1, (-1, len(_ORDER)))[:, :, _ORDER].flatten(1), _BITS)


def _deinterleave(words: Tensor, columns: int) -> Tensor:
    """int32 [rows, out / 8] → uint8 [rows, out]."""
    codes = unpack_words(words, _BITS, columns)
    return codes.unflatten(1, (-1, len(_ORDER)))[:, :, _ORDER.argsort()].flatten(1)


def _configure(contents: Contents) -> Configuration:
    (scheme,) = set(contents.assigned.values())
    return {
        "bits": _BITS,
        "group_size": scheme.group_size or -1,
        "modules_to_not_convert": contents.unquantized or None,
        "quant_method": "awq",
        "version": "gemm",
        "zero_point": True,
    }


def _scheme_of(config: Configuration, _: str) -> WeightScheme:
    return WeightScheme("", config["bits"], False, max(config["group_size"], 0))


_FORMAT = CheckpointFormat(
    name="awq",
    marks=("qweight",),
    configure=_configure,
    pack=pack_module,
    scheme_of=_scheme_of,
    unpack=_unpack_module,
    half_scales=True,
)
build_candidate, read_back = _FORMAT.build_candidate, _FORMAT.read_back
