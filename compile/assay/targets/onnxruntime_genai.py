"""Compile a decoder for onnxruntime-genai.

Its own model builder, run as a subprocess, makes a float32 graph: that is the baseline. The candidate is the same graph with
every quantized MatMul replaced by a MatMulNBits that holds our numbers. Each replaced weight is first compared with the source
checkpoint, so a builder that renames, fuses or transforms weights is noticed and not trusted.

Source: MatMulNBits in ONNX Runtime's contrib operators: B uint8 [N, K / block, block · bits / 8], low bits first; scales [N, K / block];
zero points packed along K / block; weight (code − zero point) · scale, absent zero point 2^(bits − 1).
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from assay.child import run_module
from assay.errors import AssayError, NotSupportedError
from assay.models.architectures import DecoderShape
from assay.models.checkpoint import TOKENIZER_FILES, Checkpoint
from assay.quantize.packing import pack, unpack
from assay.quantize.schemes import WeightScheme, assign_schemes
from assay.quantize.store import QuantizedLayer
from assay.quantize.weights import QuantizedWeight
from assay.recipe import OnnxRuntimeGenai, Recipe
from assay.requirements import built_with
from assay.targets.realized import Realization, StoredLinear, verify

MODEL = "model.onnx"
DATA = "model.onnx.data"
CONFIG = "genai_config.json"
_BUILDER = "onnxruntime-genai's model builder"
_BUILD_SECONDS = 3600
_BLOCKS = (256, 128, 64, 32, 16)
_WEIGHT = re.compile(
    r"^(?:model\.layers\.(?P<layer>\d+)\.(?P<block>attn|mlp)\.(?P<linear>\w+)|(?P<head>lm_head))\.MatMul\.weight$"
)
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_EMBEDDING = "model.embed_tokens.weight"


def build_baseline(checkpoint: Checkpoint, destination: Path) -> None:
    """Write the unquantized float32 model directory that onnxruntime-genai loads."""
    arguments = ["-i", str(checkpoint.directory), "-o", str(destination), "-p", "fp32", "-e", "cpu"]
    with tempfile.TemporaryDirectory() as cache:
        # It would keep its cache in the working directory.
        run_module(_BUILDER, "onnxruntime_genai.models.builder", *arguments, "-c", cache, seconds=_BUILD_SECONDS)
    if not (destination / CONFIG).is_file():
        raise AssayError(f"{_BUILDER} wrote no {CONFIG}; this release of it is not one that Assay knows.")
    _copy_tokenizer(checkpoint, destination)


def build_candidate(
    checkpoint: Checkpoint, quantized: QuantizedLayer, recipe: Recipe, baseline: Path, destination: Path
) -> Realization:
    """Write the quantized model directory and read it back; every number in it is one that the quantizer chose."""
    model = ir.load(baseline / MODEL)
    level = recipe.target.accuracy_level if isinstance(recipe.target, OnnxRuntimeGenai) else 0
    for node, names in list(_weight_nodes(model)):
        chosen = [quantized.modules[name].weight for name in names if name in quantized.modules]
        if not chosen:
            continue
        _check_source(node, names, checkpoint)
        _check_fused(names, chosen)
        _replace(model.graph, node, chosen, level)
    for name, value in quantized.tensors.items():
        _replace_tensor(model.graph, name, value, checkpoint)
    _keep_embedding(model.graph, checkpoint)
    destination.mkdir(parents=True, exist_ok=True)
    ir.save(model, destination / MODEL, external_data=DATA)
    shutil.copyfile(baseline / CONFIG, destination / CONFIG)
    _copy_tokenizer(checkpoint, destination)
    assigned = assign_schemes(recipe.quantize, checkpoint.shape).schemes
    realized = verify(checkpoint.shape, assigned, quantized.modules, read_back(destination, checkpoint.shape))
    return replace(realized, requires=built_with("onnxruntime-genai"))


def read_back(directory: Path, shape: DecoderShape) -> dict[str, StoredLinear]:
    """Every quantized Linear that a compiled model directory holds, by module name, dequantized from the file's bytes."""
    stored: dict[str, StoredLinear] = {}
    model = ir.load(directory / MODEL)
    out_features = {linear.name: linear.out_features for linear in shape.linears}
    for node in model.graph:
        if node.op_type != "MatMulNBits":
            continue
        bits, block = node.attributes["bits"].as_int(), node.attributes["block_size"].as_int()
        rows, columns = node.attributes["N"].as_int(), node.attributes["K"].as_int()
        codes = unpack(torch.from_numpy(_constant(node.inputs[1])).view(rows, -1), bits, columns)
        scales = torch.from_numpy(_constant(node.inputs[2])).view(rows, columns // block)
        zero_points = None
        if len(node.inputs) > 3 and node.inputs[3] is not None:
            zero_points = unpack(torch.from_numpy(_constant(node.inputs[3])).view(rows, -1), bits, columns // block)
        scheme = WeightScheme("", bits, zero_points is None, block)
        weight = QuantizedWeight(scheme, codes, scales, zero_points).dequantize()
        start = 0
        for name in modules_of(f"{_base_name(node)}.weight"):
            stop = start + out_features[name]
            stored[name] = StoredLinear(bits, weight[start:stop])
            start = stop
    return stored


def modules_of(initializer: str) -> tuple[str, ...]:
    """The source modules whose weights a graph initializer holds, stacked along the output channels; () for any other."""
    match = _WEIGHT.match(initializer)
    if match is None:
        return ()
    if match["head"]:
        return ("lm_head",)
    block = "self_attn" if match["block"] == "attn" else "mlp"
    return tuple(
        f"model.layers.{match['layer']}.{block}.{part}" for part in _FUSED.get(match["linear"], (match["linear"],))
    )


def _weight_nodes(model: ir.Model) -> Iterator[tuple[ir.Node, tuple[str, ...]]]:
    for node in model.graph:
        if node.op_type == "MatMul" and node.inputs[1] is not None and (names := modules_of(node.inputs[1].name or "")):
            yield node, names


def _constant(value: ir.Value | None) -> np.ndarray:
    if value is None or value.const_value is None:
        raise AssayError("a MatMulNBits in the compiled graph has no constant weight.")
    return np.array(value.const_value.numpy())


def _check_source(node: ir.Node, names: tuple[str, ...], checkpoint: Checkpoint) -> None:
    """The builder's float weight must be the checkpoint's, or our numbers would stand for something else."""
    source = torch.cat([checkpoint.weight(name) for name in names])
    if not np.array_equal(_constant(node.inputs[1]), source.T.numpy()):
        raise AssayError(
            f"onnxruntime-genai's builder changed the weights of {', '.join(names)}: its graph does not hold the checkpoint's "
            "numbers, so ours cannot be put in their place. Please report the versions of onnxruntime-genai and transformers."
        )


def _check_fused(names: tuple[str, ...], chosen: list[QuantizedWeight]) -> None:
    if len(chosen) != len(names) or len({weight.scheme for weight in chosen}) != 1:
        raise NotSupportedError(
            f"onnxruntime-genai computes {', '.join(names)} as one product: they need the same scheme and group size. "
            "Let one override match all of them."
        )


def _replace(graph: ir.Graph, node: ir.Node, weights: list[QuantizedWeight], accuracy_level: int) -> None:
    """Put a MatMulNBits with these weights, stacked, where a MatMul was."""
    scheme = weights[0].scheme
    codes = torch.cat([weight.codes for weight in weights])
    rows, columns = codes.shape
    block = scheme.group_size or _largest_block(columns)
    blocks = columns // block
    base = _base_name(node)
    inputs = [
        node.inputs[0],
        _initializer(graph, f"{base}.weight_Q{scheme.bits}", pack(codes, scheme.bits).reshape(rows, blocks, -1)),
        _initializer(
            graph, f"{base}.weight_scales", _per_block(torch.cat([weight.scales for weight in weights]), blocks)
        ),
    ]
    if not scheme.symmetric:
        points = torch.cat([weight.zero_points for weight in weights if weight.zero_points is not None])
        inputs.append(_initializer(graph, f"{base}.weight_zero_points", pack(_per_block(points, blocks), scheme.bits)))
    attributes = {"K": columns, "N": rows, "bits": scheme.bits, "block_size": block, "accuracy_level": accuracy_level}
    quantized = ir.node(
        "MatMulNBits", inputs, attributes, domain="com.microsoft", name=f"{node.name}Nbits", num_outputs=1
    )
    output, replaced = quantized.outputs[0], node.outputs[0]
    output.name, output.shape, output.type = replaced.name, replaced.shape, replaced.type
    graph.insert_before(node, quantized)
    ir.convenience.replace_all_uses_with(replaced, output, replace_graph_outputs=True)
    old = node.inputs[1]
    graph.remove(node, safe=True)
    if old is not None and not old.uses():
        del graph.initializers[old.name or ""]


def _replace_tensor(graph: ir.Graph, name: str, value: Tensor, checkpoint: Checkpoint) -> None:
    """Put a tensor that a transform changed (a norm's weight) in the place of the checkpoint's, which has to be found there."""
    held = graph.initializers.get(name)
    if held is None or not np.array_equal(_constant(held).ravel(), checkpoint.stored(name).float().numpy().ravel()):
        raise NotSupportedError(
            f"onnxruntime-genai's builder keeps {name} in another form, so what the transform made of it cannot be put in its place. "
            "Use transform: none, or compile for compressed-tensors."
        )
    held.const_value = ir.tensor(value.float().numpy().reshape(_constant(held).shape), name=name)


def _keep_embedding(graph: ir.Graph, checkpoint: Checkpoint) -> None:
    """Store a float32 embedding in the checkpoint's own dtype, which is exact and half the size.

    An embedding that is the transposed head stays so while the head is still a float MatMul.
    """
    gather = next(
        (node for node in graph if node.op_type == "Gather" and (node.name or "").endswith("embed_tokens/Gather")), None
    )
    table = gather.inputs[0] if gather is not None else None
    embedding = checkpoint.stored(f"{checkpoint.shape.architecture.embedding}.weight")
    if gather is None or table is None or embedding.dtype == torch.float32:
        return
    transpose = table.producer()
    head = transpose.inputs[0] if transpose is not None else None
    if head is not None and len(head.uses()) > 1:
        return
    output, shape = gather.outputs[0], gather.outputs[0].shape
    exact = ir.node(
        "Gather", [_initializer(graph, f"{_EMBEDDING}_exact", embedding), gather.inputs[1]], name=f"{gather.name}Exact"
    )
    cast = ir.node("Cast", [exact.outputs[0]], {"to": ir.DataType.FLOAT}, name=f"{gather.name}Cast")
    cast.outputs[0].name, cast.outputs[0].shape, cast.outputs[0].type = output.name, shape, output.type
    graph.insert_before(gather, [exact, cast])
    ir.convenience.replace_all_uses_with(output, cast.outputs[0])
    graph.remove(gather, safe=True)
    if transpose is not None:
        graph.remove(transpose, safe=True)
    unused = head if head is not None else table
    del graph.initializers[unused.name or ""]


def _initializer(graph: ir.Graph, name: str, values: Tensor) -> ir.Value:
    values = values.contiguous()
    exact = values.dtype == torch.bfloat16
    array = values.view(torch.uint16).numpy().view(ml_dtypes.bfloat16) if exact else values.numpy()
    tensor = ir.tensor(array, name=name)
    value = ir.Value(
        name=name, shape=ir.Shape(tuple(values.shape)), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.register_initializer(value)
    return value


def _per_block(values: Tensor, blocks: int) -> Tensor:
    """[rows, groups] → [rows, blocks]: a per-channel value serves every block of its row."""
    return values if values.shape[1] == blocks else values.repeat_interleave(blocks // values.shape[1], dim=1)


def _largest_block(columns: int) -> int:
    for block in _BLOCKS:
        if columns % block == 0:
            return block
    raise NotSupportedError(f"MatMulNBits needs an input size that 16 divides, not {columns}.")


def _base_name(node: ir.Node) -> str:
    """ "model.layers.0.attn.qkv_proj.MatMul" from a weight node's second input."""
    name = node.inputs[1].name if node.inputs[1] is not None else None
    return re.sub(r"\.weight(_Q\d)?$", "", name or "")


def _copy_tokenizer(checkpoint: Checkpoint, destination: Path) -> None:
    """The tokenizer served is the source's, byte for byte; the builder writes its own rendering of it."""
    for name in TOKENIZER_FILES:
        (destination / name).unlink(missing_ok=True)
        if (checkpoint.directory / name).is_file():
            shutil.copyfile(checkpoint.directory / name, destination / name)
