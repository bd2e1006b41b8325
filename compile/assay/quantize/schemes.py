"""Number formats of weights as small values, and which Linear gets which. Imports no torch."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass

from assay.models.architectures import DecoderShape
from assay.recipe import Quantize


@dataclass(frozen=True)
class WeightScheme:
    """bits: 4 or 8. group_size: consecutive input channels that share a scale; 0 means the whole row."""

    name: str
    bits: int
    symmetric: bool
    group_size: int

    @property
    def levels(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    @property
    def symmetric_zero_point(self) -> int:
        return 2 ** (self.bits - 1)

    def groups(self, in_features: int) -> int:
        return in_features // self.group_size if self.group_size else 1

    def bits_per_weight(self, in_features: int) -> float:
        """Storage per weight, 16-bit scales and packed zero points included."""
        overhead = 16 + (0 if self.symmetric else self.bits)
        return self.bits + overhead * self.groups(in_features) / in_features


_FORMATS = {"W4A16": (4, True), "W4A16_ASYM": (4, False), "W8A16": (8, True)}


def weight_scheme(name: str, group_size: int | str) -> WeightScheme:
    """The scheme of a recipe's words, e.g. ("W4A16", 64) or ("W8A16", "channel")."""
    bits, symmetric = _FORMATS[name]
    return WeightScheme(name, bits, symmetric, 0 if group_size == "channel" else int(group_size))


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
