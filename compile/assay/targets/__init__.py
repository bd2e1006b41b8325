"""Targets: a file format and the runtime that an artifact is compiled for. One file and one row each."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

if TYPE_CHECKING:
    from assay.models.checkpoint import Checkpoint
    from assay.quantize.store import QuantizedLayer
    from assay.recipe import Recipe
    from assay.targets.realized import Realization


class TargetModule(Protocol):
    """What every target's module offers."""

    def build_baseline(self, checkpoint: Checkpoint, destination: Path) -> None:
        """Write the unquantized model for this target's runtime."""
        ...

    def build_candidate(
        self,
        checkpoint: Checkpoint,
        quantized: QuantizedLayer,
        recipe: Recipe,
        baseline: Path,
        destination: Path,
    ) -> Realization:
        """Write the quantized model, read it back, and tell what it really holds."""
        ...


@dataclass(frozen=True)
class TargetRow:
    """module: where it is implemented.  runtime: what runs its artifacts.  baseline_dtype: what its unquantized weights are."""

    module: str
    runtime: str
    baseline_dtype: str


TARGETS = {
    "onnxruntime-genai": TargetRow("assay.targets.onnxruntime_genai", "onnxruntime-genai", "float32"),
    "compressed-tensors": TargetRow("assay.targets.compressed_tensors", "transformers", "as the source"),
}


def load_target(name: str) -> TargetModule:
    """Import a target's module."""
    return cast(TargetModule, importlib.import_module(TARGETS[name].module))
