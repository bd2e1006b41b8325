"""Write a compressed-tensors checkpoint: a flat Hugging Face directory that vLLM and transformers load.

Source: compressed-tensors' "pack-quantized" format. Codes are packed along the input channels into int32, lowest bits first;
zero points along the output channels; symmetric weights store none. Only configuration keys that every reader since 0.11 knows
are written, because readers refuse keys they do not know.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from assay.errors import AssayError, NotSupportedError
from assay.files import readable_json
from assay.models.architectures import DecoderShape, LinearShape
from assay.models.checkpoint import INDEX, SINGLE, TOKENIZER_FILES, Checkpoint
from assay.quantize.packing import pack, unpack
from assay.quantize.schemes import WeightScheme, assign_schemes
from assay.quantize.store import QuantizedModule
from assay.quantize.weights import QuantizedWeight
from assay.recipe import Recipe
from assay.targets.realized import Realization, StoredLinear, verify

SHARD_BYTES = 4 << 30
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
    checkpoint: Checkpoint, modules: Mapping[str, QuantizedModule], recipe: Recipe, baseline: Path, destination: Path
) -> Realization:
    """Write the quantized checkpoint and read it back; every number in it is one that the quantizer chose."""
    del baseline
    assigned = assign_schemes(recipe.quantize, checkpoint.shape).schemes
    _check_fused(checkpoint.shape, assigned)
    destination.mkdir(parents=True, exist_ok=True)
    _copy_small_files(checkpoint, destination)
    config = checkpoint.config | {"quantization_config": _quantization_config(checkpoint.shape, assigned)}
    if checkpoint.shape.architecture.head in assigned:
        config["tie_word_embeddings"] = False
    (destination / "config.json").write_bytes(readable_json(config))
    _save(_tensors(checkpoint, modules), destination)
    fallbacks = () if all(scheme.symmetric for scheme in assigned.values()) else (_ASYMMETRIC,)
    return verify(checkpoint.shape, assigned, modules, read_back(destination, checkpoint.shape), fallbacks)


def read_back(directory: Path, shape: DecoderShape) -> dict[str, StoredLinear]:
    """Every quantized Linear that a checkpoint directory holds, by module name, dequantized from the file's bytes."""
    config = json.loads((directory / "config.json").read_bytes())["quantization_config"]
    arguments = {target: group["weights"] for group in config["config_groups"].values() for target in group["targets"]}
    with ExitStack() as files:
        tensors: dict[str, Any] = {}
        for path in sorted(directory.glob("*.safetensors")):
            file = files.enter_context(safe_open(path, framework="pt"))
            tensors |= dict.fromkeys(file.keys(), file)
        return {
            linear.name: _stored(tensors, linear, arguments.get(linear.name) or arguments["Linear"])
            for linear in shape.linears
            if f"{linear.name}.weight_packed" in tensors
        }


def _stored(tensors: Mapping[str, Any], linear: LinearShape, arguments: Mapping[str, Any]) -> StoredLinear:
    """tensors: tensor name → the open file that holds it; a module's tensors may lie in two shards."""

    def read(suffix: str) -> Tensor:
        name = f"{linear.name}.{suffix}"
        if name not in tensors:
            raise AssayError(f"{name} is missing from the compiled model.")
        return tensors[name].get_tensor(name)

    bits, symmetric = arguments["num_bits"], arguments["symmetric"]
    codes = unpack(_as(torch.uint8, read("weight_packed")), bits, linear.in_features)
    zero_points = None if symmetric else _unpack_rows(read("weight_zero_point"), bits, linear.out_features)
    scheme = WeightScheme("", bits, symmetric, arguments["group_size"] or 0)
    weight = QuantizedWeight(scheme, codes, read("weight_scale").float(), zero_points)
    return StoredLinear(bits, weight.dequantize())


def _quantization_config(shape: DecoderShape, assigned: Mapping[str, WeightScheme]) -> dict[str, Any]:
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
        f"group_{index}": {
            "format": "pack-quantized",
            "input_activations": None,
            "output_activations": None,
            "targets": every if len(ordered) == 1 else names,
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
    padded = torch.nn.functional.pad(packed, (0, -packed.shape[1] % 4))
    return _as(torch.int32, padded)


def _pack_rows(values: Tensor, bits: int) -> Tensor:
    """uint8 [rows, groups] → int32 [ceil(rows · bits / 32), groups], packed along the rows."""
    return _int32(pack(values.T.contiguous(), bits)).T.contiguous()


def _unpack_rows(packed: Tensor, bits: int, rows: int) -> Tensor:
    return unpack(_as(torch.uint8, packed.T), bits, rows).T.contiguous()


def _as(dtype: torch.dtype, values: Tensor) -> Tensor:
    """The bytes of a matrix's rows as another dtype; by way of one dimension, because a single row may keep odd strides."""
    return values.reshape(-1).view(dtype).view(len(values), -1)


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
