"""Codes to bytes and back: consecutive input channels, least significant bits first.

One byte layout serves every target: viewed as uint8 [out, groups, group · bits / 8] it is MatMulNBits' B, viewed as int32
[out, in · bits / 32] on a little-endian machine it is compressed-tensors' weight_packed ("pack-quantized").
"""

from __future__ import annotations

import torch
from torch import Tensor


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [rows, columns] → uint8 [rows, columns · bits / 8]; bits: 4 or 8; an odd 4-bit column is padded with 0."""
    if bits == 8:
        return codes
    if codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """uint8 [rows, columns · bits / 8], or more with padding → uint8 codes [rows, columns]."""
    codes = packed if bits == 8 else torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)
    return codes[:, :columns].contiguous()
