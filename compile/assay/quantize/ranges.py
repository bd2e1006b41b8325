"""Where a group's grid lies: the scale and zero point that lose least.

`minmax` spans the group's extremes (compressed-tensors' rule: absmax / ((2^bits − 1) / 2), or (max − min) / (2^bits − 1) with zero
inside; absmax / 448 and absmax / 6 for floats). `mse` and `activation_weighted` try other spans and keep, per group, the one with
the least squared error; the latter weighs each input channel by the second moment of its calibration inputs, the diagonal of the
Gram matrix, which is the layer's output error with the cross terms left out.

Symmetric 4-bit integers have one level more on one side. The searches therefore also try negative scales, which turn the grid round, so
that the largest weight of a group may lie on the side that reaches further ("full range"; it costs nothing at run time). Floats gain
from other spans too, because their levels are not even: an E2M1 group may do better with its largest weight on 4 than on 6.

Scales are rounded to what the format stores before any weight is rounded, so that every target stores them exactly.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from assay.quantize.numbers import E2M1_LARGEST, E4M3_LARGEST, nearest_, power_of_two_scale, shift_of
from assay.quantize.schemes import WeightScheme
from assay.quantize.weights import Grid

_SHRUNKEN = tuple(1.0 - 0.025 * step for step in range(25))
# One octave: beyond it an 8-bit float's levels are the same again.
_OCTAVE = tuple(2.0 ** (step / 16) for step in range(16))
_AROUND = (1.0, *(0.6 + 0.05 * step for step in range(8)), *(1.05 + 0.05 * step for step in range(12)))
_POWERS_OF_TWO = (1.0, 2.0, 0.5)
# About what a processor's caches hold; a whole number of blocks of rows.
_VALUES_AT_ONCE, _BLOCK_ROWS = 1 << 19, 128
# For groups of zeros; a power of two, so that bfloat16 and float16 hold it exactly.
_SMALLEST_SCALE = 2.0**-24
_SMALLEST_E4M3 = 2.0**-9


def find_grid(
    weight: Tensor, scheme: WeightScheme, method: str, power: Tensor | None, scale_dtype: torch.dtype
) -> Grid:
    """The grid of a weight.

    weight: float32 [out, in].  method: minmax, mse or activation_weighted.  power: float32 [in], mean square of each
    input channel (activation_weighted only).  scale_dtype: what scales stored as floats must be representable in.
    """
    in_features = weight.shape[1]
    groups = scheme.groups(in_features)
    importance = None
    if method == "activation_weighted":
        if power is None:
            raise ValueError("activation_weighted needs the power of the inputs")
        importance = power.view(1, groups, -1)
    absmax = weight.abs().max()
    global_scale = None
    if scheme.scale == "e4m3":
        global_scale = torch.where(absmax > 0, E4M3_LARGEST * E2M1_LARGEST / absmax, 1.0).view(1)
    scales, zero_points = [], []
    at_once = max(1, _VALUES_AT_ONCE // in_features // _BLOCK_ROWS) * _BLOCK_ROWS
    for rows in weight.split(at_once if scheme.block_rows else len(weight)):
        grouped = rows.reshape(len(rows), groups, in_features // groups)
        spans = (1.0,) if method == "minmax" else _spans(scheme)
        scale, zero_point = _best_span(
            grouped, scheme, spans, importance=importance, scale_dtype=scale_dtype, global_scale=global_scale
        )
        scales.append(scale)
        zero_points.append(zero_point)
    return Grid(scheme, torch.cat(scales), torch.cat(zero_points), global_scale)


def _spans(scheme: WeightScheme) -> tuple[float, ...]:
    """What to try, in units of the plain span, which comes first."""
    if scheme.scale == "e8m0":
        return _POWERS_OF_TWO
    if scheme.kind == "float":
        return _AROUND if scheme.bits == 4 else _OCTAVE
    return _SHRUNKEN


def _best_span(
    grouped: Tensor,
    scheme: WeightScheme,
    spans: tuple[float, ...],
    *,
    importance: Tensor | None,
    scale_dtype: torch.dtype,
    global_scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """grouped: [rows, groups, group].  Returns scale and zero point, [rows, groups] each."""
    low, high = grouped.amin(-1).clamp_(max=0), grouped.amax(-1).clamp_(min=0)
    low, high = -_over_rows(-low, scheme, torch.amax), _over_rows(high, scheme, torch.amax)
    best_scale = best_zero_point = best_error = None
    turned = scheme.kind == "int" and scheme.symmetric and scheme.bits == 4 and len(spans) > 1
    for sign, span in itertools.product((1.0, -1.0) if turned else (1.0,), spans):
        scale, zero_point = span_to_grid(low * span, high * span, scheme, scale_dtype, global_scale)
        scale = scale * sign
        if len(spans) == 1:
            return scale, zero_point
        shift = shift_of(scheme, zero_point[:, :, None])
        levels = nearest_(grouped / scale[:, :, None], scheme.kind, scheme.bits, shift)
        loss = levels.mul_(scale[:, :, None]).sub_(grouped).square_()
        error = loss.sum(-1) if importance is None else loss.mul_(importance).sum(-1)
        error = _over_rows(error, scheme, torch.sum)
        if best_error is None or best_scale is None or best_zero_point is None:
            best_scale, best_zero_point, best_error = scale, zero_point, error
            continue
        better = error < best_error
        best_scale = torch.where(better, scale, best_scale)
        best_zero_point = torch.where(better, zero_point, best_zero_point)
        best_error = torch.where(better, error, best_error)
    assert best_scale is not None and best_zero_point is not None
    return best_scale, best_zero_point


def _over_rows(values: Tensor, scheme: WeightScheme, reduce: Callable[..., Tensor]) -> Tensor:
    """[rows, groups] → the same, every row with what `reduce` makes of all rows that share its scale (the last block may be short)."""
    if scheme.block_rows == 1:
        return values
    size = scheme.block_rows or len(values)
    return torch.cat([reduce(block, dim=0, keepdim=True).expand_as(block) for block in values.split(size)])


def span_to_grid(
    low: Tensor,
    high: Tensor,
    scheme: WeightScheme,
    scale_dtype: torch.dtype,
    global_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the grid that covers [low, high], zero included; all of one shape."""
    if not scheme.symmetric:
        scale = (high - low) / scheme.levels
        scale = scale.to(scale_dtype).float().clamp_(min=_SMALLEST_SCALE)
        return scale, (-low / scale).round_().clamp_(0, scheme.levels)
    absmax = torch.maximum(high, -low)
    zero_point = torch.full_like(absmax, scheme.symmetric_zero_point)
    if scheme.scale == "e8m0":
        return power_of_two_scale(absmax.clamp_(min=_SMALLEST_SCALE)), zero_point
    scale = absmax / scheme.largest
    if scheme.scale == "e4m3":
        assert global_scale is not None
        stored = (scale * global_scale).clamp_(max=E4M3_LARGEST).to(torch.float8_e4m3fn).float()
        return stored.clamp_(min=_SMALLEST_E4M3) / global_scale, zero_point
    return scale.to(scale_dtype).float().clamp_(min=_SMALLEST_SCALE), zero_point
