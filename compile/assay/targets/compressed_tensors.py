"""Write a compressed-tensors checkpoint: a flat Hugging Face directory that vLLM and transformers load.

How each format lays out a module's tensors is in compressed_tensors_formats.py. Only configuration keys that every reader since 0.11 knows
are written, because readers refuse keys they do not know.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from assay.errors import AssayError, NotSupportedError
from assay.files import readable_json
from assay.models.architectures import DecoderShape
from assay.models.checkpoint import INDEX, SINGLE, TOKENIZER_FILES, Checkpoint
from assay.quantize.schemes import WeightScheme, assign_schemes
from assay.quantize.store import QuantizedLayer
from assay.recipe import Recipe
from assay.targets.compressed_tensors_formats import KV_CACHE, arguments_of, pack_module, scheme_of, unpack_module
from assay.targets.lazily import Lazily
from assay.targets.realized import Realization, StoredLinear, verify

SHARD_BYTES = 2 << 30
# The first release that reads everything written here: packed zero points came with 0.9.4, a format for each group with 0.11.
_VERSION = "0.11.0"
_ASYMMETRIC = (
    "transformers 5.23 with compressed-tensors 0.20 cannot load packed zero points by from_pretrained alone (it expects them "
    "unpacked); vLLM reads them, and so does compressed-tensors' own decompressor, which `assay` evaluates with."
)


def build_baseline(checkpoint: Checkpoint, destination: Path) -> None:
    """Copy the unquantized checkpoint."""
    destination.mkdir(parents=True, exist_ok=True)
    _copy_small_files(checkpoint, destination)
    (destination / "config.json").write_bytes(readable_json(checkpoint.config))
    _save(((name, checkpoint.stored(name)) for name in sorted(checkpoint.files)), destination)


def build_candidate(
    checkpoint: Checkpoint, quantized: QuantizedLayer, recipe: Recipe, baseline: Path, destination: Path
) -> Realization:
    """Write the quantized checkpoint and read it back; every number in it is one that the quantizer chose."""
    del baseline
    assigned = assign_schemes(recipe.quantize, checkpoint.shape).schemes
    _check_fused(checkpoint.shape, assigned)
    destination.mkdir(parents=True, exist_ok=True)
    _copy_small_files(checkpoint, destination)
    config = checkpoint.config | {"quantization_config": _quantization_config(checkpoint.shape, assigned, recipe.quantize.kv_cache is not None)}
    if checkpoint.shape.architecture.head in assigned:
        config["tie_word_embeddings"] = False
    (destination / "config.json").write_bytes(readable_json(config))
    _save(_tensors(checkpoint, quantized), destination)
    fallbacks = () if all(scheme.symmetric for scheme in assigned.values()) else (_ASYMMETRIC,)
    return verify(checkpoint.shape, assigned, quantized.modules, read_back(destination, checkpoint.shape), fallbacks)


def read_back(directory: Path, shape: DecoderShape) -> Mapping[str, StoredLinear]:
    """Every quantized Linear that a checkpoint directory holds, by module name, dequantized from the file's bytes when asked for."""
    config = json.loads((directory / "config.json").read_bytes())["quantization_config"]
    groups = {target: group for group in config["config_groups"].values() for target in group["targets"]}
    files: dict[str, Path] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            files |= dict.fromkeys(file.keys(), path)
    linears = {
        linear.name: linear
        for linear in shape.linears
        if f"{linear.name}.weight_scale" in files or f"{linear.name}.weight_packed" in files
    }

    def read(name: str) -> Tensor:
        if name not in files:
            raise AssayError(f"{name} is missing from the compiled model.")
        with safe_open(files[name], framework="pt") as file:
            return file.get_tensor(name)

    def stored(name: str) -> StoredLinear:
        group = groups.get(name) or groups["Linear"]
        scheme = scheme_of(group["weights"], group["format"])
        weight = unpack_module(lambda suffix: read(f"{name}.{suffix}"), scheme, linears[name])
        return StoredLinear(scheme.bits, weight.dequantize())

    return Lazily(linears, stored)


def _quantization_config(
    shape: DecoderShape, assigned: Mapping[str, WeightScheme], kv_cache: bool
) -> dict[str, Any]:
    """One group per scheme.

    A single group targets every Linear, and the head by name, which vLLM does not count as a Linear. Several groups name all
    their modules: beside a group for every Linear, some readers would not look for the names inside a fused q/k/v.
    """
    by_scheme: dict[WeightScheme, list[str]] = {}
    for name, scheme in assigned.items():
        by_scheme.setdefault(scheme, []).append(name)
    ordered = sorted(by_scheme.items(), key=lambda item: -len(item[1]))
    every = [shape.architecture.head] * (shape.architecture.head in assigned) + ["Linear"]
    groups = {
        f"group_{index}": arguments_of(scheme) | {"targets": every if len(ordered) == 1 else names}
        for index, (scheme, names) in enumerate(ordered)
    }
    formats = {group["format"] for group in groups.values()}
    return {
        "config_groups": groups,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "ignore": [linear.name for linear in shape.linears if linear.name not in assigned],
        "kv_cache_scheme": KV_CACHE if kv_cache else None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "version": _VERSION,
    }


def _check_fused(shape: DecoderShape, assigned: Mapping[str, WeightScheme]) -> None:
    """Serving engines compute the Linears that share an input as one product, by the scheme of the first."""
    for layer in range(shape.layers):
        for group in shape.architecture.linears:
            names = [f"{shape.architecture.layers}.{layer}.{name}" for name in group]
            if len({assigned.get(name) for name in names}) > 1:
                raise NotSupportedError(
                    f"serving engines such as vLLM compute {', '.join(names)} as one product: they need the same scheme and "
                    "group size. Let one override match all of them."
                )


def _tensors(checkpoint: Checkpoint, quantized: QuantizedLayer) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the quantized checkpoint in order of name: packed ones in place of the weights they stand for."""
    weights = {f"{module}.weight": module for module in quantized.modules}
    for name in sorted({*checkpoint.files, *weights, *quantized.tensors}):
        if name in weights:
            parts = pack_module(quantized.modules[weights[name]], checkpoint.weight_dtype)
            yield from ((f"{weights[name]}.{part}", parts[part]) for part in sorted(parts))
        else:
            yield name, quantized.tensors[name] if name in quantized.tensors else checkpoint.stored(name)


def _save(tensors: Iterator[tuple[str, Tensor]], destination: Path) -> None:
    """Write safetensors, in shards of at most SHARD_BYTES, with an index when there is more than one."""
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    total = pending_bytes = 0

    def flush() -> None:
        if pending:
            path = destination / f"shard-{len(shards)}.safetensors"
            save_file(pending, path, metadata={"format": "pt"})
            path.chmod(0o644)
            shards.append(list(pending))
            pending.clear()

    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if pending_bytes + size > SHARD_BYTES:
            flush()
            pending_bytes = 0
        pending[name] = tensor.clone(memory_format=torch.contiguous_format)
        pending_bytes += size
        total += size
    flush()
    if len(shards) == 1:
        (destination / "shard-0.safetensors").rename(destination / SINGLE)
        return
    placed: dict[str, str] = {}
    for index, names in enumerate(shards):
        file = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        (destination / f"shard-{index}.safetensors").rename(destination / file)
        placed |= dict.fromkeys(names, file)
    (destination / INDEX).write_bytes(readable_json({"metadata": {"total_size": total}, "weight_map": placed}))


def _copy_small_files(checkpoint: Checkpoint, destination: Path) -> None:
    for name in TOKENIZER_FILES:
        if (checkpoint.directory / name).is_file():
            shutil.copyfile(checkpoint.directory / name, destination / name)
