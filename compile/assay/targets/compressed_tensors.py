"""Write a compressed-tensors checkpoint: a flat Hugging Face directory that transformers and vLLM load as it is.

Source: compressed-tensors' "pack-quantized" format. Codes are packed along the input channels into int32, lowest bits first;
zero points along the output channels; symmetric weights store none. Only configuration keys that every reader since 0.8 knows
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

from assay.files import readable_json
from assay.models.architectures import DecoderShape
from assay.models.checkpoint import INDEX, SINGLE, TOKENIZER_FILES, Checkpoint
from assay.quantize.packing import pack, unpack
from assay.quantize.schemes import WeightScheme, assign_schemes
from assay.quantize.store import QuantizedModule
from assay.quantize.weights import QuantizedWeight
from assay.recipe import Recipe
from assay.targets.realized import Realization, StoredLinear, verify

SHARD_BYTES = 4 << 30
_VERSION = "0.8.0"


def build_baseline(checkpoint: Checkpoint, destination: Path) -> None:
    """Copy the unquantized checkpoint."""
    destination.mkdir(parents=True, exist_ok=True)
    _copy_small_files(checkpoint, destination)
    (destination / "config.json").write_bytes(readable_json(checkpoint.config))
    _save(((name, checkpoint.stored(name)) for name in sorted(checkpoint.files)), destination)


def build_candidate(
    checkpoint: Checkpoint, modules: Mapping[str, QuantizedModule], recipe: Recipe, baseline: Path, destination: Path
) -> Realization:
    """Write the quantized checkpoint and read it back; every number in it is one that the quantizer chose."""
    del baseline
    destination.mkdir(parents=True, exist_ok=True)
    _copy_small_files(checkpoint, destination)
    assigned = assign_schemes(recipe.quantize, checkpoint.shape).schemes
    config = checkpoint.config | {"quantization_config": _quantization_config(checkpoint.shape, assigned)}
    if checkpoint.shape.architecture.head in assigned:
        config["tie_word_embeddings"] = False
    (destination / "config.json").write_bytes(readable_json(config))
    _save(_tensors(checkpoint, modules), destination)
    return verify(checkpoint.shape, assigned, modules, read_back(destination, checkpoint.shape))


def read_back(directory: Path, shape: DecoderShape) -> dict[str, StoredLinear]:
    """Every quantized Linear that a checkpoint directory holds, by module name, dequantized from the file's bytes."""
    config = json.loads((directory / "config.json").read_bytes())["quantization_config"]
    groups = list(config["config_groups"].values())
    stored: dict[str, StoredLinear] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            for linear in shape.linears:
                if f"{linear.name}.weight_packed" not in names:
                    continue
                arguments = next(
                    (group["weights"] for group in groups if linear.name in group["targets"]), groups[0]["weights"]
                )
                bits, symmetric = arguments["num_bits"], arguments["symmetric"]
                packed = file.get_tensor(f"{linear.name}.weight_packed").view(torch.uint8)
                codes = unpack(packed, bits, linear.in_features)
                scales = file.get_tensor(f"{linear.name}.weight_scale").float()
                zero_points = None
                if not symmetric:
                    zero_points = _unpack_rows(
                        file.get_tensor(f"{linear.name}.weight_zero_point"), bits, linear.out_features
                    )
                scheme = WeightScheme("", bits, symmetric, arguments["group_size"] or 0)
                stored[linear.name] = StoredLinear(
                    bits, QuantizedWeight(scheme, codes, scales, zero_points).dequantize()
                )
    return stored


def _quantization_config(shape: DecoderShape, assigned: Mapping[str, WeightScheme]) -> dict[str, Any]:
    """One group per scheme: the most common one targets every Linear, the others name their modules."""
    by_scheme: dict[WeightScheme, list[str]] = {}
    for name, scheme in assigned.items():
        by_scheme.setdefault(scheme, []).append(name)
    ordered = sorted(by_scheme.items(), key=lambda item: -len(item[1]))
    groups = {
        f"group_{index}": {
            "format": "pack-quantized",
            "input_activations": None,
            "output_activations": None,
            "targets": ["Linear"] if index == 0 else names,
            "weights": {
                "num_bits": scheme.bits,
                "type": "int",
                "symmetric": scheme.symmetric,
                "strategy": "group" if scheme.group_size else "channel",
                "group_size": scheme.group_size or None,
                "dynamic": False,
            },
        }
        for index, (scheme, names) in enumerate(ordered)
    }
    return {
        "config_groups": groups,
        "format": "pack-quantized",
        "ignore": [linear.name for linear in shape.linears if linear.name not in assigned],
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "version": _VERSION,
    }


def _tensors(checkpoint: Checkpoint, modules: Mapping[str, QuantizedModule]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the quantized checkpoint in order of name: packed ones in place of the weights they stand for."""
    head = checkpoint.shape.architecture.head
    names = set(checkpoint.files) | ({f"{head}.weight"} if head in modules else set())
    for name in sorted(names):
        module = name.removesuffix(".weight")
        if module not in modules:
            yield name, checkpoint.stored(name)
            continue
        weight, dtype = modules[module].weight, checkpoint.weight_dtype
        yield f"{module}.weight_packed", _int32(pack(weight.codes, weight.scheme.bits))
        yield f"{module}.weight_scale", weight.scales.to(dtype)
        yield f"{module}.weight_shape", torch.tensor(weight.codes.shape, dtype=torch.int64)
        if weight.zero_points is not None:
            yield f"{module}.weight_zero_point", _pack_rows(weight.zero_points, weight.scheme.bits)


def _int32(packed: Tensor) -> Tensor:
    """uint8 [rows, bytes] → int32 [rows, ceil(bytes / 4)], little-endian, padded with zeros."""
    padding = -packed.shape[1] % 4
    return torch.nn.functional.pad(packed, (0, padding)).contiguous().view(torch.int32)


def _pack_rows(values: Tensor, bits: int) -> Tensor:
    """uint8 [rows, groups] → int32 [ceil(rows · bits / 32), groups], packed along the rows."""
    return _int32(pack(values.T.contiguous(), bits)).T.contiguous()


def _unpack_rows(packed: Tensor, bits: int, rows: int) -> Tensor:
    return unpack(packed.T.contiguous().view(torch.uint8), bits, rows).T.contiguous()


def _save(tensors: Iterator[tuple[str, Tensor]], destination: Path) -> None:
    """Write safetensors, in shards of at most SHARD_BYTES, with an index when there is more than one."""
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    total = pending_bytes = 0

    def flush() -> None:
        if pending:
            save_file(pending, destination / f"shard-{len(shards)}.safetensors", metadata={"format": "pt"})
            shards.append(list(pending))
            pending.clear()

    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if pending_bytes + size > SHARD_BYTES:
            flush()
            pending_bytes = 0
        pending[name] = tensor.contiguous()
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
