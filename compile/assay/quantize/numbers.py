"""The numbers that a format can hold, in units of the scale ("levels"), and their codes.

Integers: level = code − zero point. E4M3 ("fp8"): OCP's 8-bit float without infinities, up to ±448. E2M1 ("fp4"): 0, ½, 1, 1½, 2, 3, 4, 6
and their negatives. A float's code is its bit pattern.

Source: OCP 8-bit Floating Point Specification 1.0; OCP Microscaling Formats Specification 1.0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from assay.quantize.schemes import Kind, WeightScheme

E4M3_LARGEST = 448.0
E2M1_LARGEST = 6.0
_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
# Twice a magnitude → its place in the list above.
_E2M1_PLACE = torch.tensor([0, 1, 2, 3, 4, 0, 5, 0, 6, 0, 0, 0, 7], dtype=torch.uint8)


def nearest_(scaled: Tensor, kind: Kind, bits: int, zero_point: Tensor | float) -> Tensor:
    """Replace float32 values, in units of the scale, by the nearest levels; halves go to the even code.

    zero_point: what integers are shifted by, a number or broadcast against the values; floats have none.
    """
    if kind == "int":
        low, high = -zero_point, 2**bits - 1 - zero_point
        scaled.round_()
        if isinstance(low, Tensor):
            # Twice as fast as clamp_ where the bounds are broadcast.
            return torch.minimum(torch.maximum(scaled, low, out=scaled), high, out=scaled)
        return scaled.clamp_(low, high)
    if bits == 8:
        return scaled.copy_(scaled.clamp_(-E4M3_LARGEST, E4M3_LARGEST).to(torch.float8_e4m3fn))
    scaled.clamp_(-E2M1_LARGEST, E2M1_LARGEST)
    magnitude = scaled.abs()
    # The distance between neighbours: ½ below 2, 1 below 4, 2 above.
    step = torch.where(magnitude < 4, torch.where(magnitude < 2, 0.5, 1.0), 2.0)
    return scaled.div_(step).round_().mul_(step)


def shift_of(scheme: WeightScheme, zero_points: Tensor) -> Tensor | int:
    """What levels are shifted by to be codes: the zero points, or a symmetric scheme's one number, which is faster."""
    return scheme.symmetric_zero_point if scheme.symmetric else zero_points


def encode(levels: Tensor, scheme: WeightScheme, zero_point: Tensor | float) -> Tensor:
    """uint8 codes of levels, which must be of the format."""
    if scheme.kind == "int":
        return (levels + zero_point).to(torch.uint8)
    if scheme.bits == 8:
        return levels.to(torch.float8_e4m3fn).view(torch.uint8)
    return _E2M1_PLACE[(levels.abs() * 2).long()] | (levels < 0).to(torch.uint8) << 3


def decode(codes: Tensor, scheme: WeightScheme, zero_point: Tensor | float) -> Tensor:
    """float32 levels of uint8 codes."""
    if scheme.kind == "int":
        return codes.float().sub_(zero_point)
    if scheme.bits == 8:
        return codes.view(torch.float8_e4m3fn).float()
    magnitude = _E2M1[(codes & 7).long()]
    return torch.where(codes > 7, -magnitude, magnitude)


def power_of_two_scale(absmax: Tensor) -> Tensor:
    """The scale, a power of two, of E2M1 values up to absmax: the smallest that clips them by less than 1/7 (to 6 from below 7).

    This is the OCP rule with rounding instead of truncation, as the compressed-tensors format's own tools apply it.
    """
    return torch.ldexp(torch.ones_like(absmax), torch.frexp(absmax / 7).exponent.clamp(-126, 126))
