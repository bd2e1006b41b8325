"""What a Linear's inputs become at run time: quantized to their scheme and back, in float32, as compressed-tensors defines it.

The rule is symmetric throughout: scale = absmax / largest level. Engines differ from it in the last digits only (vLLM divides by 127 where
compressed-tensors divides by 127.5).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from assay.quantize.numbers import E2M1_LARGEST, E4M3_LARGEST, nearest_, power_of_two_scale
from assay.quantize.schemes import ActivationScheme

_EPSILON = torch.finfo(torch.float32).eps
_SPANS = tuple(1.0 - 0.05 * step for step in range(15))
_SAMPLED_VALUES = 1 << 20


def quantize_inputs(values: Tensor, scheme: ActivationScheme, calibrated: Tensor | None) -> Tensor:
    """The values that a kernel computes with.

    values: float32 [..., features].  calibrated: float32 [1], the scale of static schemes, the global scale over E4M3 ones, else None.
    """
    grouped = values.unflatten(-1, (-1, scheme.group_size)) if scheme.group_size else values
    scale = calibrated if scheme.static else _scale(grouped, scheme, calibrated)
    assert scale is not None
    zero_point = 2 ** (scheme.bits - 1) if scheme.kind == "int" else 0
    levels = nearest_(grouped / scale, scheme.kind, scheme.bits, zero_point)
    return levels.mul_(scale).view_as(values)


def _scale(grouped: Tensor, scheme: ActivationScheme, global_scale: Tensor | None) -> Tensor:
    absmax = grouped.abs().amax(-1, keepdim=True)
    if scheme.scale == "e8m0":
        return power_of_two_scale(absmax.clamp_(min=2.0**-100))
    scale = absmax / scheme.largest
    if scheme.scale == "e4m3":
        assert global_scale is not None
        stored = (scale * global_scale).clamp_(max=E4M3_LARGEST).to(torch.float8_e4m3fn).float()
        return torch.where(stored == 0, 0.125, stored) / global_scale
    return torch.where(scale == 0, _EPSILON, scale)


def calibrate(inputs: Sequence[Tensor], scheme: ActivationScheme, method: str, dtype: torch.dtype) -> Tensor:
    """The number that a calibrated scheme needs: float32 [1].

    inputs: calibration inputs, float32 [tokens, features] each.  method: minmax for the greatest magnitude; any other searches the span with
    the least squared error on a sample of the inputs (integers only: floats lose nothing by reaching far).
    dtype: what a static scale must be representable in.
    """
    absmax = max(float(batch.abs().max()) if batch.numel() else 0.0 for batch in inputs)
    if scheme.scale == "e4m3":
        return torch.tensor([E4M3_LARGEST * E2M1_LARGEST / absmax if absmax > 0 else 1.0])

    def scale_of(span: float) -> Tensor:
        return torch.tensor([max(absmax * span / scheme.largest, _EPSILON)]).to(dtype).float()

    if method == "minmax" or scheme.kind == "float":
        return scale_of(1.0)
    stride = max(1, sum(batch.numel() for batch in inputs) // _SAMPLED_VALUES)
    sample = torch.cat([batch.flatten()[::stride] for batch in inputs])
    scales = [scale_of(span) for span in _SPANS]
    losses = [float((quantize_inputs(sample, scheme, scale) - sample).square().sum()) for scale in scales]
    return scales[losses.index(min(losses))]
