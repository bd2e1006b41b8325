"""A weight stored in a scheme, and the grid of points it may take.

Codes are unsigned, 0 … 2^bits − 1, and a weight is (code − zero_point) · scale. A symmetric scheme has the constant zero point
2^(bits − 1) and stores none. This is at once MatMulNBits' reading and compressed-tensors' (whose signed value + 2^(bits − 1)
is the same code), so every target packs the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from assay.quantize.schemes import WeightScheme


@dataclass(frozen=True)
class QuantizedWeight:
    """A Linear's weight in a scheme.

    codes: uint8 [out, in].  scales: float32 [out, groups], each exactly representable in the model's own dtype.
    zero_points: uint8 [out, groups], None when symmetric.
    """

    scheme: WeightScheme
    codes: Tensor
    scales: Tensor
    zero_points: Tensor | None

    def rows(self, start: int, stop: int) -> QuantizedWeight:
        """The weight's output channels from start to stop."""
        zero_points = None if self.zero_points is None else self.zero_points[start:stop]
        return QuantizedWeight(self.scheme, self.codes[start:stop], self.scales[start:stop], zero_points)

    def dequantize(self) -> Tensor:
        """float32 [out, in]: exactly the numbers that a runtime computes with."""
        out_features, in_features = self.codes.shape
        groups = self.scales.shape[1]
        codes = self.codes.view(out_features, groups, in_features // groups).float()
        zero_points = (
            self.scheme.symmetric_zero_point if self.zero_points is None else self.zero_points.float()[:, :, None]
        )
        return ((codes - zero_points) * self.scales[:, :, None]).view(out_features, in_features)


@dataclass(frozen=True)
class Grid:
    """The points a weight may take: scales float32 [out, groups], zero_points float32 [out, groups] (whole numbers)."""

    scheme: WeightScheme
    scales: Tensor
    zero_points: Tensor

    def group(self, column: int) -> int:
        """Which group an input channel belongs to."""
        return column // self.scheme.group_size if self.scheme.group_size else 0

    def quantize(self, weight: Tensor) -> QuantizedWeight:
        """Round every value of float32 [out, in] to the nearest point."""
        out_features, in_features = weight.shape
        grouped = weight.view(out_features, self.scales.shape[1], -1)
        codes = (
            (grouped / self.scales[:, :, None])
            .round_()
            .add_(self.zero_points[:, :, None])
            .clamp_(0, self.scheme.levels)
        )
        return self.with_codes(codes.view(out_features, in_features))

    def with_codes(self, codes: Tensor) -> QuantizedWeight:
        """A weight on this grid; codes: whole numbers [out, in] of any dtype."""
        zero_points = None if self.scheme.symmetric else self.zero_points.to(torch.uint8)
        return QuantizedWeight(self.scheme, codes.to(torch.uint8), self.scales, zero_points)
