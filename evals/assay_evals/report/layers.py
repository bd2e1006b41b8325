"""The layers of a manifest, grouped for a chart: one strip per kind of module, one bar per block of the model.

`model.layers.7.mlp.experts.3.down_proj` is a bar at block 7 of the strip `mlp.experts.*.down_proj`; where several
modules share a bar (experts), it shows the largest error of them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from assay_evals.report.charts import bars

_IN_BLOCK = re.compile(r"^.*?\.(\d+)\.(.+)$")
WORST = 5


@dataclass(frozen=True)
class Layer:
    """One module as compiled; relative_error: squared output error over squared output on the calibration text."""

    name: str
    scheme: str
    group_size: int | str | None
    relative_error: float | None
    bits_per_weight: float | None

    @property
    def precision(self) -> str:
        if self.scheme == "none":
            return "unquantized"
        if self.group_size is None:
            return self.scheme
        return f"{self.scheme}, {'per channel' if self.group_size == 'channel' else f'groups of {self.group_size}'}"

    @property
    def summary(self) -> str:
        return f"{self.name}: {self.precision}, error {percent(self.relative_error)}"


@dataclass(frozen=True)
class Strip:
    """One kind of module over the blocks of the model."""

    kind: str
    chart: Markup
    largest: str


@dataclass(frozen=True)
class Precision:
    """How many modules got which number format."""

    precision: str
    modules: int
    bits_per_weight: float | None
    marked: bool


@dataclass(frozen=True)
class Layers:
    """Everything the report says about layers. scale: the error at which a bar is full; unknown: some have none."""

    strips: tuple[Strip, ...]
    alone: tuple[Layer, ...]
    worst: tuple[Layer, ...]
    precisions: tuple[Precision, ...]
    scale: float
    unknown: bool


def read_layers(manifest: Mapping[str, Any]) -> list[Layer]:
    """The manifest's layers; what a layer leaves out is not known."""
    return [
        Layer(
            name=str(entry["name"]),
            scheme=str(entry.get("scheme", "unknown")),
            group_size=entry.get("group_size"),
            relative_error=entry.get("relative_error"),
            bits_per_weight=entry.get("bits_per_weight"),
        )
        for entry in manifest.get("layers", [])
    ]


def chart_layers(layers: Sequence[Layer]) -> Layers:
    """Group layers into strips, the worst of them, and a count of each precision."""
    kinds: dict[str, dict[int, list[Layer]]] = {}
    alone: list[Layer] = []
    for layer in layers:
        if found := _IN_BLOCK.match(layer.name):
            kind = re.sub(r"\.\d+\.", ".*.", found.group(2))
            kinds.setdefault(kind, {}).setdefault(int(found.group(1)), []).append(layer)
        else:
            alone.append(layer)
    errors = [layer.relative_error for layer in layers if layer.relative_error is not None]
    scale = max(errors, default=0.0)
    common = Counter(layer.precision for layer in layers).most_common(1)
    usual = common[0][0] if common else ""
    blocks = range(1 + max((max(members) for members in kinds.values()), default=-1))
    return Layers(
        strips=tuple(_strip(kind, members, blocks, scale, usual) for kind, members in kinds.items()),
        alone=tuple(alone),
        worst=tuple(sorted((one for one in layers if one.relative_error), key=_by_error)[:WORST]),
        precisions=_precisions(layers, usual),
        scale=scale,
        unknown=len(errors) < len(layers),
    )


def percent(error: float | None) -> str:
    """An error with two significant digits, as modules differ by orders of magnitude."""
    return "not measured" if error is None else f"{100 * error:.2g}%"


def _by_error(layer: Layer) -> tuple[float, str]:
    return -(layer.relative_error or 0.0), layer.name


def _strip(kind: str, members: dict[int, list[Layer]], blocks: range, scale: float, usual: str) -> Strip:
    heights: list[float | None] = []
    titles: list[str] = []
    classes: list[str] = []
    for block in blocks:
        worst = min(members.get(block, []), key=_by_error, default=None)
        heights.append(worst.relative_error if worst else None)
        titles.append(worst.summary if worst else f"block {block}: none")
        classes.append("usual" if worst and worst.precision == usual else "other")
    largest = max((height for height in heights if height is not None), default=None)
    return Strip(kind, bars(heights, scale, titles, classes), percent(largest))


def _precisions(layers: Sequence[Layer], usual: str) -> tuple[Precision, ...]:
    groups: dict[str, list[Layer]] = {}
    for layer in layers:
        groups.setdefault(layer.precision, []).append(layer)
    return tuple(
        Precision(
            precision=precision,
            modules=len(members),
            bits_per_weight=_mean([layer.bits_per_weight for layer in members]),
            marked=precision != usual,
        )
        for precision, members in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
