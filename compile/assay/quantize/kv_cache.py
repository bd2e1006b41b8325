"""Scales of a key/value cache kept in 8-bit floats: one for the keys and one for the values of each layer.

The cache is where keys and values are met as engines store them: after rotary embedding and head norms.
"""

from __future__ import annotations

import torch
from torch import Tensor

from assay.quantize.numbers import E4M3_LARGEST


class CacheRange:
    """Stands in for a layer's key/value cache: notes the greatest magnitudes, keeps nothing."""

    def __init__(self) -> None:
        self._keys = self._values = 0.0

    def update(self, keys: Tensor, values: Tensor, *_arguments: object, **_named: object) -> tuple[Tensor, Tensor]:
        """What transformers' attention calls with new keys and values, float32 [batch, heads, length, head size] each."""
        self._keys = max(self._keys, float(keys.abs().max()))
        self._values = max(self._values, float(values.abs().max()))
        return keys, values

    def scales(self, attention: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """`k_scale` and `v_scale` [1] of an attention module by full name: absmax / 448."""
        found = {"k_scale": self._keys, "v_scale": self._values}
        return {
            f"{attention}.{name}": torch.tensor([absmax / E4M3_LARGEST or 1.0]).to(dtype)
            for name, absmax in found.items()
        }
