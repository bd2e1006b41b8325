"""Where a group's grid lies: the scale and zero point that lose least.

`minmax` spans the group's extremes (compressed-tensors' rule: absmax / ((2^bits − 1) / 2), or (max − min) / (2^bits − 1) with zero
inside). `mse` and `activation_weighted` try shrunken spans and keep, per group, the one with the least squared error; the
latter weighs each input channel by the second moment of its calibration inputs, the diagonal of the Gram matrix, which is the
layer's output error with the cross terms left out.

Symmetric grids have one level more on one side. The searches therefore also try negative scales, which turn the grid round, so
that the largest weight of a group may lie on the side that reaches further ("full range"; it costs nothing at run time).

Scales are rounded to the model's dtype before any weight is rounded, so that every target stores them exactly.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from assay.quantize.schemes import WeightScheme
from assay.quantize.weights import Grid

_SPANS = tuple(1.0 - 0.025 * step for step in range(25))
_ROWS_AT_ONCE = 512
# For groups of zeros; a power of two, so that bfloat16 and float16 hold it exactly.
_SMALLEST_SCALE = 2.0**-24


def find_grid(
    weight: Tensor, scheme: WeightScheme, method: str, power: Tensor | None, scale_dtype: torch.dtype
) -> Grid:
    """The grid of a weight.

    weight: float32 [out, in].  method: minmax, mse or activation_weighted.  power: float32 [in], mean square of each
    input channel (activation_weighted only).  scale_dtype: what the scales must be representable in.
    """
    in_features = weight.shape[1]
    groups = scheme.groups(in_features)
    importance = None
    if method == "activation_weighted":
        if power is None:
            raise ValueError("activation_weighted needs the power of the inputs")
        importance = power.view(1, groups, -1)
    scales, zero_points = [], []
    for rows in weight.split(_ROWS_AT_ONCE):
        grouped = rows.reshape(len(rows), groups, in_features // groups)
        spans = (1.0,) if method == "minmax" else _SPANS
        scale, zero_point = _best_span(grouped, scheme, spans, importance, scale_dtype)
        scales.append(scale)
        zero_points.append(zero_point)
    return Grid(scheme, torch.cat(scales), torch.cat(zero_points))


def _best_span(
    grouped: Tensor, scheme: WeightScheme, spans: tuple[float, ...], importance: Tensor | None, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """grouped: [rows, groups, group].  Returns scale and zero point, [rows, groups] each."""
    low, high = grouped.amin(-1).clamp_(max=0), grouped.amax(-1).clamp_(min=0)
    best_scale = best_zero_point = best_error = None
    signs = (1.0, -1.0) if scheme.symmetric and len(spans) > 1 else (1.0,)
    for sign, span in itertools.product(signs, spans):
        scale, zero_point = span_to_grid(low * span, high * span, scheme, scale_dtype)
        scale = scale * sign
        if len(spans) == 1:
            return scale, zero_point
        codes = (grouped / scale[:, :, None]).round_().add_(zero_point[:, :, None]).clamp_(0, scheme.levels)
        loss = codes.sub_(zero_point[:, :, None]).mul_(scale[:, :, None]).sub_(grouped).square_()
        error = loss.sum(-1) if importance is None else loss.mul_(importance).sum(-1)
        if best_error is None or best_scale is None or best_zero_point is None:
            best_scale, best_zero_point, best_error = scale, zero_point, error
            continue
        better = error < best_error
        best_scale = torch.where(better, scale, best_scale)
        best_zero_point = torch.where(better, zero_point, best_zero_point)
        best_error = torch.where(better, error, best_error)
    assert best_scale is not None and best_zero_point is not None
    return best_scale, best_zero_point


def span_to_grid(low: Tensor, high: Tensor, scheme: WeightScheme, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the grid that covers [low, high], zero included; all of one shape."""
    if scheme.symmetric:
        scale = torch.maximum(high, -low) / (scheme.levels / 2)
        zero_point = torch.full_like(scale, scheme.symmetric_zero_point)
    else:
        scale = (high - low) / scheme.levels
        scale = scale.to(scale_dtype).float().clamp_(min=_SMALLEST_SCALE)
        zero_point = (-low / scale).round_().clamp_(0, scheme.levels)
    return scale.to(scale_dtype).float().clamp_(min=_SMALLEST_SCALE), zero_point
