"""Finished layers on disk: one safetensors file per layer, whole or absent, so that a killed job goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from assay.errors import IntegrityError
from assay.files import atomic_path
from assay.lazily import Lazily
from assay.quantize.packing import pack, unpack
from assay.quantize.schemes import ActivationScheme, WeightScheme
from assay.quantize.weights import QuantizedWeight


@dataclass(frozen=True)
class QuantizedModule:
    """A quantized Linear and what is known of it.

    relative_error: squared output error over squared output on the calibration inputs.  damping: what GPTQ's factor took,
    None for other methods.  input_scale: float32 [1], for activation schemes that are calibrated (activations.calibrate).
    """

    weight: QuantizedWeight
    relative_error: float | None
    damping: float | None = None
    input_scale: Tensor | None = None


@dataclass(frozen=True)
class QuantizedLayer:
    """A finished layer, or all of them.

    modules: quantized Linears by full name.  tensors: other tensors of the checkpoint that the job changed or added, by full name: norms and
    biases that took up a transform's factors, scales of the key/value cache.  notes: sentences on what is not as asked.
    """

    modules: Mapping[str, QuantizedModule]
    tensors: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    notes: tuple[str, ...] = ()


class LayerStore:
    """Quantized layers by index; the head, if quantized, is the index after the last layer."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def path(self, index: int) -> Path:
        return self.directory / f"layer-{index:04d}.safetensors"

    def holds(self, index: int) -> bool:
        return self.path(index).is_file()

    def write(self, index: int, layer: QuantizedLayer) -> None:
        tensors: dict[str, Tensor] = {f"{name}:tensor": value.contiguous() for name, value in layer.tensors.items()}
        facts: dict[str, Any] = {}
        for name, module in layer.modules.items():
            weight = module.weight
            parts = {
                "codes": pack(weight.codes, weight.scheme.bits),
                "scales": weight.scales,
                "zero_points": weight.zero_points,
                "global_scale": weight.global_scale,
                "input_scale": module.input_scale,
            }
            # Copies of what Linears with the same input have in common: a file may not hold one tensor under two names.
            tensors |= {f"{name}:{part}": value.clone() for part, value in parts.items() if value is not None}
            facts[name] = {
                "scheme": asdict(weight.scheme),
                "in_features": weight.codes.shape[1],
                "relative_error": module.relative_error,
                "damping": module.damping,
            }
        # One key: safetensors writes several in no particular order.
        metadata = {"layer": json.dumps({"modules": facts, "notes": layer.notes}, sort_keys=True)}
        with atomic_path(self.path(index)) as temporary:
            save_file(tensors, temporary, metadata=metadata)
            temporary.chmod(0o644)

    def read(self, index: int) -> QuantizedLayer:
        """One layer; its modules are read from the file when they are asked for."""
        path = self.path(index)
        with _damage(path), safe_open(path, framework="pt") as file:
            metadata: dict[str, Any] = json.loads((file.metadata() or {})["layer"])
            facts: dict[str, Any] = metadata["modules"]
            changed = [name for name in file.keys() if name.endswith(":tensor")]  # noqa: SIM118
            tensors = {name.removesuffix(":tensor"): file.get_tensor(name) for name in changed}

            def module(name: str) -> QuantizedModule:
                with _damage(path), safe_open(path, framework="pt") as file:
                    return _module(file, name, facts[name])

            return QuantizedLayer(Lazily(facts, module), tensors, tuple(metadata["notes"]))

    def read_all(self, count: int) -> QuantizedLayer:
        """Every layer that is there, of `count`, as one."""
        layers = [self.read(index) for index in range(count) if self.holds(index)]
        holders = {name: layer.modules for layer in layers for name in layer.modules}
        tensors = {name: value for layer in layers for name, value in layer.tensors.items()}
        notes = tuple(note for layer in layers for note in layer.notes)
        return QuantizedLayer(Lazily(holders, lambda name: holders[name][name]), tensors, notes)


@contextmanager
def _damage(path: Path) -> Generator[None]:
    try:
        yield
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise IntegrityError(f"{path}: damaged ({error}); remove it and run again.") from error


def _module(file: Any, name: str, fact: dict[str, Any]) -> QuantizedModule:
    def read(part: str) -> Any:
        return file.get_tensor(f"{name}:{part}")

    held = set(file.keys())
    settings = dict(fact["scheme"])
    activations = settings.pop("activations")
    scheme = WeightScheme(**settings, activations=activations and ActivationScheme(**activations))
    weight = QuantizedWeight(
        scheme=scheme,
        codes=unpack(read("codes"), scheme.bits, fact["in_features"]),
        scales=read("scales"),
        zero_points=None if scheme.symmetric else read("zero_points"),
        global_scale=read("global_scale") if scheme.scale == "e4m3" else None,
    )
    input_scale = read("input_scale") if f"{name}:input_scale" in held else None
    return QuantizedModule(weight, fact["relative_error"], fact["damping"], input_scale)
