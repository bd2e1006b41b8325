"""Codes in int32 words, as checkpoints of integer weights store them: consecutive columns, least significant bits first."""

from __future__ import annotations

import torch
from torch import Tensor

from assay.quantize.packing import pack, unpack


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [rows, columns] → int32 [rows, ceil(columns · bits / 32)], the last word padded with zeros."""
    packed = pack(codes, bits)
    return _as(torch.int32, torch.nn.functional.pad(packed, (0, -packed.shape[1] % 4)))


def unpack_words(words: Tensor, bits: int, columns: int) -> Tensor:
    """int32 [rows, words] → uint8 codes [rows, columns]."""
    return unpack(_as(torch.uint8, words), bits, columns)


def _as(dtype: torch.dtype, values: Tensor) -> Tensor:
    """The bytes of a matrix's rows as another dtype; by way of one dimension, because a single row may keep odd strides."""
    return values.reshape(-1).view(dtype).view(len(values), -1)
