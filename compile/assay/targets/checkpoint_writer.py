"""Write a checkpoint, a flat Hugging Face directory that serving engines load, and read it back, in any format.

What is a format's own is a CheckpointFormat: the configuration, and how a quantized Linear becomes tensors and is made of them.
Everything else is the source's, byte for byte: tokenizer, chat template, and the tensors that the job did not change.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from assay.errors import AssayError
from assay.files import readable_json
from assay.lazily import Lazily
from assay.models.architectures import DecoderShape, LinearShape
from assay.models.checkpoint import Checkpoint, copy_tokenizer
from assay.models.shards import save_shards
from assay.quantize.schemes import WeightScheme, assign_schemes
from assay.quantize.store import QuantizedLayer, QuantizedModule
from assay.quantize.weights import QuantizedWeight
from assay.recipe import Recipe
from assay.targets.realized import Realization, StoredLinear, verify
from assay.targets.refusals import check_format

Configuration = dict[str, Any]
# A module's tensor by the last part of its name.
Read = Callable[[str], Tensor]


@dataclass(frozen=True)
class Contents:
    """What a configuration has to tell: the Linears, the scheme of each quantized one, whether the key/value cache has scales."""

    shape: DecoderShape
    assigned: Mapping[str, WeightScheme]
    kv_cache: bool

    @property
    def unquantized(self) -> list[str]:
        """Every Linear and router that stays as it is."""
        linears = [linear.name for linear in self.shape.linears if linear.name not in self.assigned]
        return [*linears, *self.shape.routers]


def _no_files(_: Configuration) -> Mapping[str, Configuration]:
    return {}


def _as_it_is(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    return name, tensor


def _exactly(module: QuantizedModule) -> QuantizedModule:
    return module


def _nothing(_: Iterable[WeightScheme]) -> tuple[str, ...]:
    return ()


@dataclass(frozen=True)
class CheckpointFormat:
    """One format.

    name: its row in TARGETS.  marks: a module is quantized when it has a tensor whose name ends so.
    configure: the quantization_config of config.json.  files: other configuration files that follow from it, by name.
    pack: a module's tensors by the last part of their names; the dtype is that of scales stored as floats.
    scheme_of: a module's scheme by the configuration, as far as its bytes depend on it.  unpack: a weight out of a module's tensors.
    half_scales: scales are stored in float16, not in the model's dtype, when all of them are exact in it.
    rename: what becomes of a tensor that the job added or changed.
    rendered: a module with the numbers that the format's own arithmetic makes of what was chosen.
    notes: what the manifest has to say of these schemes in this format.
    """

    name: str
    marks: tuple[str, ...]
    configure: Callable[[Contents], Configuration]
    pack: Callable[[QuantizedModule, torch.dtype], dict[str, Tensor]]
    scheme_of: Callable[[Configuration, str], WeightScheme]
    unpack: Callable[[Read, WeightScheme, LinearShape], QuantizedWeight]
    files: Callable[[Configuration], Mapping[str, Configuration]] = _no_files
    half_scales: bool = False
    rename: Callable[[str, Tensor], tuple[str, Tensor]] = _as_it_is
    rendered: Callable[[QuantizedModule], QuantizedModule] = _exactly
    notes: Callable[[Iterable[WeightScheme]], tuple[str, ...]] = _nothing

    def build_candidate(
        self, checkpoint: Checkpoint, quantized: QuantizedLayer, recipe: Recipe, baseline: Path, destination: Path
    ) -> Realization:
        """Write the quantized checkpoint and read it back; every number in it is what the format makes of the quantizer's."""
        del baseline
        shape = checkpoint.shape
        assigned = assign_schemes(recipe.quantize, shape).schemes
        check_format(self.name, shape, assigned)
        dtype, notes = _scale_dtype(self, quantized.modules, checkpoint.weight_dtype)
        copy_tokenizer(checkpoint.directory, destination)
        quantization = self.configure(Contents(shape, assigned, recipe.quantize.kv_cache is not None))
        config = checkpoint.config | {"quantization_config": quantization}
        if shape.architecture.head in assigned:
            config["tie_word_embeddings"] = False
        for name, content in ({"config.json": config} | dict(self.files(quantization))).items():
            (destination / name).write_bytes(readable_json(content))
        save_shards(_tensors(self, checkpoint, quantized, dtype), destination)
        rendered = Lazily(quantized.modules, lambda name: self.rendered(quantized.modules[name]))
        notes += self.notes(assigned.values())
        return verify(shape, assigned, rendered, self.read_back(destination, shape), notes)

    def read_back(self, directory: Path, shape: DecoderShape) -> Mapping[str, StoredLinear]:
        """Every quantized Linear that a checkpoint directory holds, by module name, dequantized from the file's bytes when asked for."""
        config = json.loads((directory / "config.json").read_bytes())["quantization_config"]
        files: dict[str, Path] = {}
        for path in sorted(directory.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                files |= dict.fromkeys(file.keys(), path)
        linears = {
            linear.name: linear
            for linear in shape.linears
            if any(f"{linear.name}.{mark}" in files for mark in self.marks)
        }

        def read(name: str) -> Tensor:
            if name not in files:
                raise AssayError(f"{name} is missing from the compiled model.")
            with safe_open(files[name], framework="pt") as file:
                return file.get_tensor(name)

        def stored(name: str) -> StoredLinear:
            scheme = self.scheme_of(config, name)
            weight = self.unpack(lambda suffix: read(f"{name}.{suffix}"), scheme, linears[name])
            return StoredLinear(scheme.bits, weight.dequantize())

        return Lazily(linears, stored)


def build_baseline(checkpoint: Checkpoint, destination: Path) -> None:
    """Copy the unquantized checkpoint."""
    copy_tokenizer(checkpoint.directory, destination)
    (destination / "config.json").write_bytes(readable_json(checkpoint.config))
    save_shards(((name, checkpoint.stored(name)) for name in sorted(checkpoint.files)), destination)


def _scale_dtype(
    form: CheckpointFormat, modules: Mapping[str, QuantizedModule], dtype: torch.dtype
) -> tuple[torch.dtype, tuple[str, ...]]:
    """What scales are stored in, and a note when it is not what the format's other writers use."""
    if not form.half_scales or dtype == torch.float16:
        return dtype, ()
    for name in modules:
        scales = modules[name].weight.scales
        if not torch.equal(scales.half().float(), scales):
            shown = str(dtype).removeprefix("torch.")
            return dtype, (
                f"{form.name} stores scales as float16 by custom; these are {shown}, because those of {name} (and perhaps others) "
                "are not exact in float16. vLLM and SGLang convert scales to the dtype that they compute in.",
            )
    return torch.float16, ()


def _tensors(
    form: CheckpointFormat, checkpoint: Checkpoint, quantized: QuantizedLayer, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the quantized checkpoint in order of the sources' names: packed ones in place of the weights they stand for."""
    weights = {f"{module}.weight": module for module in quantized.modules}
    for name in sorted({*checkpoint.files, *weights, *quantized.tensors}):
        if name in weights:
            parts = form.pack(quantized.modules[weights[name]], dtype)
            yield from ((f"{weights[name]}.{part}", parts[part]) for part in sorted(parts))
        elif name in quantized.tensors:
            yield form.rename(name, quantized.tensors[name])
        else:
            yield name, checkpoint.stored(name)
