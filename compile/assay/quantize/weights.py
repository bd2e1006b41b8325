"""A weight stored in a scheme, and the grid of points it may take.

Codes are unsigned bytes, and a weight is level(code) · scale. Integers: 0 … 2^bits − 1, level = code − zero point; a symmetric scheme has the
constant zero point 2^(bits − 1) and stores none. This is at once MatMulNBits' reading and compressed-tensors' (whose signed value +
2^(bits − 1) is the same code), so every target packs the same numbers. Floats: the code is the bit pattern (numbers.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from assay.quantize.numbers import decode, encode, nearest_, shift_of
from assay.quantize.schemes import WeightScheme


@dataclass(frozen=True)
class QuantizedWeight:
    """A Linear's weight in a scheme.

    codes: uint8 [out, in].  scales: float32 [out, groups], each exactly what the scheme's stored scales give: representable in the
    model's own dtype, a power of two, or an E4M3 value divided by the global scale; equal along the rows that share one.
    zero_points: uint8 [out, groups], None when symmetric.  global_scale: float32 [1], for scales stored in E4M3.
    """

    scheme: WeightScheme
    codes: Tensor
    scales: Tensor
    zero_points: Tensor | None
    global_scale: Tensor | None = None

    def rows(self, start: int, stop: int) -> QuantizedWeight:
        """The weight's output channels from start to stop."""
        zero_points = None if self.zero_points is None else self.zero_points[start:stop]
        return QuantizedWeight(
            self.scheme, self.codes[start:stop], self.scales[start:stop], zero_points, self.global_scale
        )

    def e4m3_scales(self) -> Tensor:
        """The scales as a scheme with a global scale stores them: E4M3 [out, groups]."""
        assert self.global_scale is not None
        return (self.scales * self.global_scale).to(torch.float8_e4m3fn)

    def dequantize(self) -> Tensor:
        """float32 [out, in]: exactly the numbers that a runtime computes with."""
        out_features, in_features = self.codes.shape
        groups = self.scales.shape[1]
        zero_points = (
            self.scheme.symmetric_zero_point if self.zero_points is None else self.zero_points.float()[:, :, None]
        )
        levels = decode(self.codes.view(out_features, groups, in_features // groups), self.scheme, zero_points)
        return levels.mul_(self.scales[:, :, None]).view(out_features, in_features)


@dataclass(frozen=True)
class Grid:
    """The points a weight may take: scales float32 [out, groups], zero_points float32 [out, groups] (whole numbers)."""

    scheme: WeightScheme
    scales: Tensor
    zero_points: Tensor
    global_scale: Tensor | None = None

    @staticmethod
    def stack(grids: Sequence[Grid]) -> Grid:
        """One grid for weights stacked along their output channels; a global scale is the first one's."""
        return Grid(
            grids[0].scheme,
            torch.cat([grid.scales for grid in grids]),
            torch.cat([grid.zero_points for grid in grids]),
            grids[0].global_scale,
        )

    def group(self, column: int) -> int:
        """Which group an input channel belongs to."""
        return column // self.scheme.group_size if self.scheme.group_size else 0

    def quantize(self, weight: Tensor) -> QuantizedWeight:
        """Round every value of float32 [out, in] to the nearest point."""
        out_features, in_features = weight.shape
        scaled = weight.view(out_features, self.scales.shape[1], -1) / self.scales[:, :, None]
        shift = shift_of(self.scheme, self.zero_points[:, :, None])
        levels = nearest_(scaled, self.scheme.kind, self.scheme.bits, shift)
        return self.with_levels(levels.view(out_features, in_features))

    def with_levels(self, levels: Tensor) -> QuantizedWeight:
        """A weight on this grid; levels: float32 [out, in], each one of the format's."""
        out_features, in_features = levels.shape
        grouped = levels.reshape(out_features, self.scales.shape[1], -1)
        shift = shift_of(self.scheme, self.zero_points[:, :, None])
        codes = encode(grouped, self.scheme, shift).view(out_features, in_features)
        zero_points = None if self.scheme.symmetric else self.zero_points.to(torch.uint8)
        return QuantizedWeight(self.scheme, codes, self.scales, zero_points, self.global_scale)
