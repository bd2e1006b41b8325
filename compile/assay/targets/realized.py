"""What a compiled model really holds, layer by layer, read back from its files: the same answer from every target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from assay.errors import AssayError
from assay.models.architectures import DecoderShape
from assay.quantize.schemes import WeightScheme
from assay.quantize.store import QuantizedModule


@dataclass(frozen=True)
class StoredLinear:
    """A quantized Linear as found in compiled files: bits, and its dequantized weight, float32 [out, in]."""

    bits: int
    weight: Tensor


@dataclass(frozen=True)
class Realization:
    """layers: one row per Linear for the manifest.  fallbacks: sentences on everything that is not as asked.

    requires: what a machine must have to run these bytes (assay.requirements).  facts: what else a target has the manifest say.
    """

    layers: tuple[dict[str, Any], ...]
    fallbacks: tuple[str, ...]
    requires: Mapping[str, Any] = field(default_factory=dict[str, Any])
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])


def verify(
    shape: DecoderShape,
    assigned: Mapping[str, WeightScheme],
    modules: Mapping[str, QuantizedModule],
    stored: Mapping[str, StoredLinear],
    fallbacks: tuple[str, ...] = (),
) -> Realization:
    """Compare the compiled files with what the quantizer chose; AssayError unless every number is the same.

    assigned: the scheme each Linear was asked for.  modules: what the quantizer chose.  stored: what the files hold.
    """
    layers: list[dict[str, Any]] = []
    for linear in shape.linears:
        scheme, found = assigned.get(linear.name), stored.get(linear.name)
        row: dict[str, Any] = {"name": linear.name, "shape": [linear.out_features, linear.in_features]}
        if scheme is None:
            if found is not None:
                raise AssayError(
                    f"{linear.name} was to stay unquantized, but the compiled model holds {found.bits}-bit weights."
                )
            layers.append(row | {"scheme": "none", "group_size": None, "bits_per_weight": None, "relative_error": None})
            continue
        if found is None or found.bits != scheme.bits:
            held = "float weights" if found is None else f"{found.bits}-bit weights"
            raise AssayError(f"{linear.name} was to be {scheme.name}, but the compiled model holds {held}.")
        chosen = modules[linear.name]
        if not torch.equal(found.weight, chosen.weight.dequantize()):
            raise AssayError(f"{linear.name}: the compiled model's numbers are not the ones that the quantizer chose.")
        layers.append(
            row
            | {
                "scheme": scheme.name,
                "group_size": scheme.group_size or "channel",
                "bits_per_weight": round(scheme.bits_per_weight(linear.in_features), 4),
                "relative_error": chosen.relative_error,
                "damping": chosen.damping,
            }
        )
    return Realization(tuple(layers), fallbacks)
