"""Edits of an ONNX graph that targets share: constants, and a product with a quantized weight in the place of a float one.

Source: MatMulNBits in ONNX Runtime's contrib operators: B uint8 [N, K / block, block · bits / 8], low bits first; scales [N, K / block];
zero points packed along K / block; weight (code − zero point) · scale, absent zero point 2^(bits − 1).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from assay.errors import AssayError, NotSupportedError
from assay.models.checkpoint import Checkpoint
from assay.quantize.packing import pack, unpack
from assay.quantize.schemes import WeightScheme
from assay.quantize.weights import QuantizedWeight

CONTRIB = "com.microsoft"
_BLOCKS = (256, 128, 64, 32, 16)


def initializer(graph: ir.Graph, name: str, values: Tensor) -> ir.Value:
    """A new constant of the graph."""
    values = values.contiguous()
    exact = values.dtype == torch.bfloat16
    array = values.view(torch.uint16).numpy().view(ml_dtypes.bfloat16) if exact else values.numpy()
    tensor = ir.tensor(array, name=name)
    value = ir.Value(
        name=name, shape=ir.Shape(tuple(values.shape)), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.register_initializer(value)
    return value


def constant(value: ir.Value | None) -> np.ndarray:
    """The numbers of a constant input."""
    if value is None or value.const_value is None:
        raise AssayError("a quantized product in the compiled graph has no constant weight.")
    return np.array(value.const_value.numpy())


def put_in_place(graph: ir.Graph, node: ir.Node, weight: ir.Value | None, output: ir.Value) -> None:
    """Let `output`, which was computed before a node, be what the node's output was; remove the node, and its weight with its last user."""
    replaced = node.outputs[0]
    output.name, output.shape, output.type = replaced.name, replaced.shape, replaced.type
    ir.convenience.replace_all_uses_with(replaced, output, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    if weight is not None and not weight.uses():
        del graph.initializers[weight.name or ""]


def matmul_nbits(
    graph: ir.Graph, node: ir.Node, base: str, weights: Sequence[QuantizedWeight], accuracy_level: int
) -> ir.Value:
    """The output of a MatMulNBits with these weights, stacked, of what a MatMul is given; its constants are called after `base`."""
    scheme = weights[0].scheme
    codes = torch.cat([weight.codes for weight in weights])
    rows, columns = codes.shape
    block = scheme.group_size or _largest_block(columns)
    blocks = columns // block
    scales = _per_block(torch.cat([weight.scales for weight in weights]), blocks)
    packed = pack(codes, scheme.bits).reshape(rows, blocks, -1)
    inputs = [
        node.inputs[0],
        initializer(graph, f"{base}.weight_Q{scheme.bits}", packed),
        initializer(graph, f"{base}.weight_scales", scales),
    ]
    if not scheme.symmetric:
        points = torch.cat([weight.zero_points for weight in weights if weight.zero_points is not None])
        inputs.append(initializer(graph, f"{base}.weight_zero_points", pack(_per_block(points, blocks), scheme.bits)))
    attributes = {"K": columns, "N": rows, "bits": scheme.bits, "block_size": block, "accuracy_level": accuracy_level}
    quantized = ir.node("MatMulNBits", inputs, attributes, domain=CONTRIB, name=f"{node.name}Nbits", num_outputs=1)
    graph.insert_before(node, quantized)
    return quantized.outputs[0]


def stored_nbits(node: ir.Node) -> tuple[int, Tensor]:
    """Bits of a MatMulNBits, and its weight, float32 [out, in], dequantized from the graph's bytes."""
    bits, block = node.attributes["bits"].as_int(), node.attributes["block_size"].as_int()
    rows, columns = node.attributes["N"].as_int(), node.attributes["K"].as_int()
    codes = unpack(torch.from_numpy(constant(node.inputs[1])).view(rows, -1), bits, columns)
    scales = torch.from_numpy(constant(node.inputs[2])).view(rows, columns // block)
    zero_points = None
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        zero_points = unpack(torch.from_numpy(constant(node.inputs[3])).view(rows, -1), bits, columns // block)
    scheme = WeightScheme("", bits, zero_points is None, block)
    return bits, QuantizedWeight(scheme, codes, scales, zero_points).dequantize()


def replace_tensor(graph: ir.Graph, name: str, value: Tensor, checkpoint: Checkpoint, builder: str) -> None:
    """Put a tensor that a transform changed (a norm's weight) in the place of the checkpoint's, which has to be found there."""
    held = graph.initializers.get(name)
    if held is None or not np.array_equal(constant(held).ravel(), checkpoint.stored(name).float().numpy().ravel()):
        raise NotSupportedError(
            f"{builder} keeps {name} in another form, so what the transform made of it cannot be put in its place. "
            "Use transform: none, or compile for compressed-tensors."
        )
    held.const_value = ir.tensor(value.float().numpy().reshape(constant(held).shape), name=name)


def _per_block(values: Tensor, blocks: int) -> Tensor:
    """[rows, groups] → [rows, blocks]: a per-channel value serves every block of its row."""
    return values if values.shape[1] == blocks else values.repeat_interleave(blocks // values.shape[1], dim=1)


def _largest_block(columns: int) -> int:
    for block in _BLOCKS:
        if columns % block == 0:
            return block
    raise NotSupportedError(f"MatMulNBits needs an input size that 16 divides, not {columns}.")


def tensors(values: Iterable[ir.Value]) -> list[dict[str, Any]]:
    """A graph's inputs or outputs as the manifest tells them: name, type as numpy calls it, shape; a free axis is its name."""
    rows: list[dict[str, Any]] = []
    for value in values:
        if value.dtype is None or value.shape is None:
            raise AssayError(f"{value.name}: the graph does not tell its type and shape.")
        shape = [dim if isinstance(dim, int) else str(dim) for dim in value.shape]
        rows.append({"name": value.name, "dtype": str(value.dtype.numpy()), "shape": shape})
    return rows
