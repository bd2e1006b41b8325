"""Number formats of weights and activations as small values, and which Linear gets which. Imports no torch."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass, replace
from typing import Literal

from assay.models.architectures import DecoderShape
from assay.recipe import Quantize

Kind = Literal["int", "float"]
# How a scale is stored: a float (for weights in the model's dtype), an E4M3 byte under one float32 scale for the whole tensor
# (NVFP4), or a power of two (MXFP4, E8M0).
ScaleFormat = Literal["float", "e4m3", "e8m0"]

_LARGEST: dict[tuple[str, int], float] = {("float", 8): 448.0, ("float", 4): 6.0}
_SCALE_BITS = {"float": 16, "e4m3": 8, "e8m0": 8}


@dataclass(frozen=True)
class ActivationScheme:
    """How a Linear's inputs are quantized while the model runs; symmetric in every case.

    group_size: consecutive channels of a token that share a scale: 0 for the whole token.
    static: one scale for every token, calibrated beforehand, takes the place of the tokens' own.
    """

    kind: Kind
    bits: int
    group_size: int = 0
    static: bool = False
    scale: ScaleFormat = "float"

    @property
    def largest(self) -> float:
        """What the greatest magnitude of a scale's channels is mapped to."""
        key = (self.kind, self.bits)
        return _LARGEST[key] if key in _LARGEST else (2**self.bits - 1) / 2

    @property
    def calibrated(self) -> bool:
        """Whether a number in the checkpoint is needed: the static scale, or the global scale over E4M3 ones."""
        return self.static or self.scale == "e4m3"


@dataclass(frozen=True)
class WeightScheme:
    """kind, bits: int4, int8, E4M3 (float, 8) or E2M1 (float, 4).  group_size: consecutive input channels that share a scale; 0 means
    the whole row.  block_rows: output channels that share a scale; 0 means all.  symmetric: True for floats.
    """

    name: str
    bits: int
    symmetric: bool
    group_size: int
    kind: Kind = "int"
    block_rows: int = 1
    scale: ScaleFormat = "float"
    activations: ActivationScheme | None = None

    @property
    def levels(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    @property
    def largest(self) -> float:
        """Symmetric schemes: what the greatest magnitude of a group is mapped to by the plain rule, in units of the scale."""
        return _LARGEST.get((self.kind, self.bits), self.levels / 2)

    @property
    def symmetric_zero_point(self) -> int:
        """The code of zero in a symmetric scheme of integers; codes of floats need none."""
        return 2 ** (self.bits - 1) if self.kind == "int" else 0

    @property
    def shared_by_fused(self) -> bool:
        """Whether Linears that an engine computes as one product must have one scale in common."""
        return self.block_rows == 0 or self.scale == "e4m3"

    def groups(self, in_features: int) -> int:
        return in_features // self.group_size if self.group_size else 1

    def bits_per_weight(self, in_features: int) -> float:
        """Storage per weight, scales and packed zero points included."""
        overhead = _SCALE_BITS[self.scale] + (0 if self.symmetric else self.bits)
        shared = self.block_rows or in_features
        return self.bits + overhead * self.groups(in_features) / in_features / shared


_TOKEN_INT8 = ActivationScheme("int", 8)
_TOKEN_FP8 = ActivationScheme("float", 8)
DEFAULT_GROUP_SIZE = 64
# Those whose group size the recipe chooses: 64 by default.
_GROUPED = {
    "W4A16": WeightScheme("W4A16", 4, True, DEFAULT_GROUP_SIZE),
    "W4A16_ASYM": WeightScheme("W4A16_ASYM", 4, False, DEFAULT_GROUP_SIZE),
    "W8A16": WeightScheme("W8A16", 8, True, DEFAULT_GROUP_SIZE),
}
_FIXED = {
    "W8A8": WeightScheme("W8A8", 8, True, 0, activations=_TOKEN_INT8),
    "W8A8_STATIC": WeightScheme("W8A8_STATIC", 8, True, 0, activations=replace(_TOKEN_INT8, static=True)),
    "FP8": WeightScheme("FP8", 8, True, 0, "float", 0, activations=replace(_TOKEN_FP8, static=True)),
    "FP8_DYNAMIC": WeightScheme("FP8_DYNAMIC", 8, True, 0, "float", activations=_TOKEN_FP8),
    "FP8_BLOCK": WeightScheme("FP8_BLOCK", 8, True, 128, "float", 128, activations=ActivationScheme("float", 8, 128)),
    "MXFP4A16": WeightScheme("MXFP4A16", 4, True, 32, "float", scale="e8m0"),
    "MXFP4": WeightScheme(
        "MXFP4", 4, True, 32, "float", scale="e8m0", activations=ActivationScheme("float", 4, 32, scale="e8m0")
    ),
    "NVFP4A16": WeightScheme("NVFP4A16", 4, True, 16, "float", scale="e4m3"),
    "NVFP4": WeightScheme(
        "NVFP4", 4, True, 16, "float", scale="e4m3", activations=ActivationScheme("float", 4, 16, scale="e4m3")
    ),
}


def weight_scheme(name: str, group_size: int | str | None = None) -> WeightScheme:
    """The scheme of a recipe's words, e.g. ("W4A16", 64), ("W8A16", "channel") or ("W8A8", None)."""
    if name in _FIXED:
        return _FIXED[name]
    return replace(_GROUPED[name], group_size=0 if group_size == "channel" else int(group_size or DEFAULT_GROUP_SIZE))


@dataclass(frozen=True)
class Assignment:
    """Which scheme each Linear gets (a module that is not here stays as it is), and the overrides that match nothing."""

    schemes: dict[str, WeightScheme]
    unmatched: tuple[int, ...]


def assign_schemes(settings: Quantize, shape: DecoderShape) -> Assignment:
    """Schemes by module name: every Linear of the layers; the head only when an override names it."""
    schemes: dict[str, WeightScheme] = {}
    matched: set[int] = set()
    for linear in shape.linears:
        hits = [
            index
            for index, override in enumerate(settings.overrides)
            if fnmatch.fnmatchcase(linear.name, override.match)
        ]
        matched.update(hits)
        scheme, group_size = settings.scheme, settings.group_size
        if hits:
            override = settings.overrides[hits[0]]
            scheme, group_size = override.scheme, override.group_size or group_size
        elif linear.name == shape.architecture.head:
            continue
        if scheme != "none":
            schemes[linear.name] = weight_scheme(scheme, group_size)
    return Assignment(schemes, tuple(index for index in range(len(settings.overrides)) if index not in matched))
