"""Finished layers on disk: one safetensors file per layer, whole or absent, so that a killed job goes on where it stopped."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from assay.errors import IntegrityError
from assay.files import atomic_path
from assay.quantize.packing import pack, unpack
from assay.quantize.schemes import WeightScheme
from assay.quantize.weights import QuantizedWeight


@dataclass(frozen=True)
class QuantizedModule:
    """A quantized Linear and what is known of it.

    relative_error: squared output error over squared output on the calibration inputs.  damping: what GPTQ's factor took,
    None for other methods.
    """

    weight: QuantizedWeight
    relative_error: float | None
    damping: float | None = None


class LayerStore:
    """Quantized layers by index; the head, if quantized, is the index after the last layer."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def path(self, index: int) -> Path:
        return self.directory / f"layer-{index:04d}.safetensors"

    def holds(self, index: int) -> bool:
        return self.path(index).is_file()

    def write(self, index: int, modules: dict[str, QuantizedModule]) -> None:
        """Store one layer's modules by full name."""
        tensors: dict[str, Tensor] = {}
        facts: dict[str, Any] = {}
        for name, module in modules.items():
            weight = module.weight
            tensors[f"{name}.codes"] = pack(weight.codes, weight.scheme.bits).contiguous()
            tensors[f"{name}.scales"] = weight.scales.contiguous()
            if weight.zero_points is not None:
                tensors[f"{name}.zero_points"] = weight.zero_points.contiguous()
            facts[name] = {
                "scheme": asdict(weight.scheme),
                "in_features": weight.codes.shape[1],
                "relative_error": module.relative_error,
                "damping": module.damping,
            }
        with atomic_path(self.path(index)) as temporary:
            save_file(tensors, temporary, metadata={"modules": json.dumps(facts, sort_keys=True)})
            temporary.chmod(0o644)

    def read(self, index: int) -> dict[str, QuantizedModule]:
        """The modules of one layer by full name."""
        try:
            with safe_open(self.path(index), framework="pt") as file:
                facts = json.loads((file.metadata() or {})["modules"])
                return {name: _module(file, name, fact) for name, fact in facts.items()}
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise IntegrityError(f"{self.path(index)}: damaged ({error}); remove it and run again.") from error


def _module(file: Any, name: str, fact: dict[str, Any]) -> QuantizedModule:
    scheme = WeightScheme(**fact["scheme"])
    weight = QuantizedWeight(
        scheme=scheme,
        codes=unpack(file.get_tensor(f"{name}.codes"), scheme.bits, fact["in_features"]),
        scales=file.get_tensor(f"{name}.scales"),
        zero_points=None if scheme.symmetric else file.get_tensor(f"{name}.zero_points"),
    )
    return QuantizedModule(weight, fact["relative_error"], fact["damping"])
